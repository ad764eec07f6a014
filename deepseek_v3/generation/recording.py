"""What `return_dict_in_generate` asks for, token by token although several come at once.

Letters: B rows, V vocabulary, D hidden.
"""

from typing import Any

import torch


class Recorder:
    """Collects scores, logits and hidden states for each new token of each row.

    A row that has ended has zeros where others go on.

    Args:
        config: the call's generation configuration, which says what is wanted.
        rows: B.
    """

    def __init__(self, config: Any, rows: int) -> None:
        wanted = config.return_dict_in_generate
        self._wants_scores = bool(wanted and config.output_scores)
        self._wants_logits = bool(wanted and config.output_logits)
        self.hidden_states = bool(wanted and config.output_hidden_states)
        self.wanted = self._wants_scores or self._wants_logits or self.hidden_states
        self._scores: list[list[torch.Tensor]] = [[] for _ in range(rows)]
        self._pending: dict[int, torch.Tensor] = {}
        self._logits: list[list[torch.Tensor]] = [[] for _ in range(rows)]
        self._prompt_states: tuple[torch.Tensor, ...] = ()
        self._states: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(rows)]

    def scores(self, rows: list[int], scores: list[torch.Tensor]) -> None:
        """Processed scores [positions, V] of some rows, of which `prompt` or `step` says how many count."""
        if self._wants_scores:
            self._pending.update(zip(rows, scores, strict=True))

    def prompt(self, logits: torch.Tensor, hidden_states: Any) -> None:
        """The forward over the prompt: logits [B, V] of the first token, states [B, P, D] of each layer."""
        for row, own in enumerate(logits):
            self._take(row, own[None], 1)
        if self.hidden_states:
            self._prompt_states = hidden_states

    def step(self, rows: list[int], kept: list[int], output: Any) -> None:
        """A verification: `kept` tokens of each of `rows`. Where nothing is wanted, `output` may be None."""
        if not self.wanted:
            return
        for i, (row, count) in enumerate(zip(rows, kept, strict=True)):
            if count == 0:
                continue
            self._take(row, output.logits[i], count)
            if self.hidden_states:
                for position in range(count):
                    self._states[row].append(tuple(layer[i, position] for layer in output.hidden_states))

    def _take(self, row: int, logits: torch.Tensor, count: int) -> None:
        if self._wants_logits:
            self._logits[row].extend(logits[:count].float())
        if self._wants_scores:
            self._scores[row].extend(self._pending[row][:count])

    def outputs(self) -> dict[str, Any]:
        """`scores`, `logits` and `hidden_states` as plain decoding returns them, where they were asked for."""
        result: dict[str, Any] = {}
        if self._wants_scores:
            result["scores"] = _by_step(self._scores)
        if self._wants_logits:
            result["logits"] = _by_step(self._logits)
        if self.hidden_states:
            layers = range(len(self._prompt_states))
            steps = [_by_step([[states[layer] for states in row] for row in self._states]) for layer in layers]
            later = (tuple(steps[layer][step][:, None] for layer in layers) for step in range(len(steps[0])))
            result["hidden_states"] = (self._prompt_states, *later)
        return result


def _by_step(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """[B, .] for each step, from each row's own steps."""
    longest = max(len(row) for row in rows)
    filler = next((torch.zeros_like(row[0]) for row in rows if row), None)
    return tuple(torch.stack([row[step] if step < len(row) else filler for row in rows]) for step in range(longest))  # type: ignore[misc]
