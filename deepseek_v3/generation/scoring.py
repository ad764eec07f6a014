"""Logits processors and stopping criteria on rows of different lengths, as plain decoding would apply them.

A processor that looks at nothing but the scores runs once for all rows and drafts. Any other is called for one row
and one position at a time with that row's own tokens, in their order, and only for positions whose earlier drafts
were accepted: it sees what it would see in plain decoding, so that state is safe.

Letters: B rows, V vocabulary.
"""

import copy
from typing import Any

import torch
from transformers.generation import logits_process as processors
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

_SCORES_ALONE: tuple[type, ...] = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.SuppressTokensLogitsProcessor,
)
# Of these, the ones that never wait for the device.
_LAUNCHES_ALONE: tuple[type, ...] = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
)
_RUNS_THE_MODEL: tuple[type, ...] = (processors.UnbatchedClassifierFreeGuidanceLogitsProcessor,)
# Of transformers' own, these keep state or ask for the row's place in the batch.
_OWN_STATE: tuple[type, ...] = (
    processors.PrefixConstrainedLogitsProcessor,
    processors.SynthIDTextWatermarkLogitsProcessor,
)


def _is_stateless(processor: Any) -> bool:
    return type(processor).__module__ == processors.__name__ and not isinstance(processor, _OWN_STATE)


class RowScorer:
    """Applies a `LogitsProcessorList` to single rows.

    Args:
        chain: the processors of this call, in their order.
        rows: B.

    Raises:
        ValueError: a processor runs the model itself (classifier-free guidance).
    """

    def __init__(self, chain: LogitsProcessorList, rows: int) -> None:
        for processor in chain:
            if isinstance(processor, _RUNS_THE_MODEL):
                raise ValueError("use_mtp cannot be combined with guidance_scale, which runs the model on its own")
        self.vectorised = all(type(processor) in _SCORES_ALONE for processor in chain)
        self.capturable = all(type(processor) in _LAUNCHES_ALONE for processor in chain)
        self.rows = rows
        self._shared: Any = chain
        self._stateless = all(_is_stateless(processor) for processor in chain)
        # With one row there is no other to disturb: the caller's own objects are used, and keep their state.
        own = self._stateless or rows == 1
        self._chains = [chain if own else copy.deepcopy(chain) for _ in range(rows)]

    def all(self, scores: torch.Tensor) -> torch.Tensor:
        """Process [n, V] scores that need no tokens (only where `vectorised`)."""
        nothing = torch.zeros((scores.shape[0], 1), dtype=torch.long, device=scores.device)
        return self._shared(nothing, scores.float())

    def row(self, row: int, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Process the next scores [V] of a row that has `tokens` [n]; state moves on."""
        return self._apply(self._chains[row], row, tokens, scores)

    def look_ahead(self, row: int, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The same for a draft, which may be rejected: state stays as it is."""
        chain = self._chains[row] if self._stateless else copy.deepcopy(self._chains[row])
        return self._apply(chain, row, tokens, scores)

    def _apply(self, chain: Any, row: int, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._stateless or self.rows == 1:
            return chain(tokens[None], scores[None].float())[0]
        # Whoever indexes by row finds the row in its place, among copies of itself.
        return chain(tokens.expand(self.rows, -1), scores.float().expand(self.rows, -1))[row]


class RowStopper:
    """Applies a `StoppingCriteriaList` to single rows, one token at a time.

    Args:
        criteria: of this call.
        rows: B.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: int) -> None:
        self.rows = rows
        self.max_length = min((c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)), default=None)
        self._ends = {int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.flatten()}
        plain = (MaxLengthCriteria, EosTokenCriteria)
        self._others = StoppingCriteriaList([c for c in criteria if not isinstance(c, plain)])

    def ends_by_itself(self, token: int, length: int) -> bool:
        """Whether an EOS token or the length ends a row; asks no other criterion, and moves no state."""
        return token in self._ends or (self.max_length is not None and length >= self.max_length)

    def stops(self, row: int, length: int, token: int, tokens: Any) -> bool:
        """Whether a row ends with `token`, its `length`-th; `tokens()` gives the whole row [length] if asked."""
        done = self.ends_by_itself(token, length)
        if self._others:  # called in any case: a criterion may count its calls
            ids = tokens()[None]
            result = self._others(ids if self.rows == 1 else ids.expand(self.rows, -1), None)
            done = bool(result[0 if self.rows == 1 else row]) or done
        return done
