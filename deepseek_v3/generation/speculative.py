"""Speculative decoding with the model's own MTP modules, for batches, lossless.

Each step drafts k tokens a row, lets the main model process the last chosen token and the drafts in one forward, and
keeps the drafts that plain decoding would have chosen (or, when sampling, that rejection sampling keeps), and one
token more. Rows keep different numbers of drafts: each has its own length in the cache, and what was rejected is
overwritten by the next step.

Letters: B unfinished rows, P prompt slots, k drafts, V vocabulary, D hidden.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..modeling_deepseek_v3.cache import LatentCache, RowSlots
from .acceptance import accept, accept_one, choose
from .drafting import Drafter, Rows
from .recording import Recorder
from .scoring import RowScorer, RowStopper
from .statistics import GenerateMtpOutput, MtpStatistics, make_depth


class SpeculativeDecoder:
    """One call of `generate(use_mtp=True)`.

    Args:
        model: the causal LM.
        input_ids: [B, I], the prompts as they begin the output (I is 0 where the prompt is given as embeddings).
        prompt_embeds: [B, N, D] embeddings of the prompt's new part, or None to look the tokens up.
        prompt_mask: [B, P] bool, over past and new slots.
        prompt_positions: [B, P].
        cache: a `LatentCache`, empty or holding the first slots.
        processors, criteria: prepared by `generate`.
        config: the call's generation configuration.
        streamer: for B = 1.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        prompt_embeds: torch.Tensor | None,
        prompt_mask: torch.Tensor,
        prompt_positions: torch.Tensor,
        cache: LatentCache,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: Any,
        depth: Any,
        streamer: Any = None,
        keep_cache: bool = True,
    ) -> None:
        self.model, self.cache, self.config, self.streamer = model, cache, config, streamer
        self.input_ids, self.prompt_embeds, self.keep_cache = input_ids, prompt_embeds, keep_cache
        self.past = int(cache.get_seq_length())
        grows = cache.sliding_window is None and cache.max_cache_len is None
        self.rows = Rows(prompt_mask, prompt_positions, self.past, grows)
        self.policy = make_depth(depth, model, len(input_ids))
        # A graph runs as many rows as it was made for, and a fixed cache has no slots to spare.
        idle = self.policy.idle if cache.graphs is None and cache.max_cache_len is None else 0
        self.drafter = Drafter(model, cache, self.rows, self.policy.deepest, idle)
        batch = len(input_ids)
        self.scorer, self.stopper = RowScorer(processors, batch), RowStopper(criteria, batch)
        self.recorder = Recorder(config, batch)
        self.statistics = MtpStatistics()
        self.policy.begin(self.statistics)
        self.new: list[list[int]] = [[] for _ in range(batch)]
        self.done = [False] * batch

    def run(self) -> Any:
        """Decode until every row has ended; token ids [B, L], or a `GenerateMtpOutput`."""
        try:
            self._prefill()
            while not all(self.done):
                self._drop_finished()
                started = time.perf_counter()
                drafts = self._affordable(self.policy.next())
                self._step(drafts)
                self.policy.took(drafts, time.perf_counter() - started)
            self.statistics.warn_if_useless()
            if self.streamer is not None:
                self.streamer.end()
            return self._finish()
        finally:
            self.cache.hold(None)

    # One row's bookkeeping

    def _tokens(self, row: int, more: list[int] | None = None) -> torch.Tensor:
        """All tokens of an original row, prompt first, as processors and criteria see them."""
        new = torch.tensor(self.new[row] + (more or []), dtype=torch.long, device=self.input_ids.device)
        return torch.cat((self.input_ids[row], new))

    def _append(self, row: int, tokens: list[int]) -> int:
        """Give a row its next tokens until one ends it; how many it kept."""
        for kept, token in enumerate(tokens, start=1):
            self.new[row].append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            length = self.input_ids.shape[1] + len(self.new[row])
            if self.stopper.stops(row, length, token, lambda: self._tokens(row)):
                self.done[row] = True
                return kept
        return len(tokens)

    def _room(self, row: int) -> int:
        """Tokens that a row may still get."""
        if self.stopper.max_length is None:
            return 1 << 30
        return self.stopper.max_length - self.input_ids.shape[1] - len(self.new[row])

    def _affordable(self, drafts: int) -> int:
        """No more drafts than any unfinished row could use, or than a fixed cache has slots for."""
        active = [row for row in self.rows.index if not self.done[row]]
        drafts = min(drafts, max(self._room(row) for row in active) - 1)
        if self.cache.max_cache_len is not None:
            drafts = min(drafts, self.cache.max_cache_len - 1 - max(self.rows.stands))
        return max(drafts, 0)

    # The prompt

    def _prefill(self) -> None:
        embeds = self.prompt_embeds
        if embeds is None:
            embeds = self.model.get_input_embeddings()(self.input_ids[:, self.past :])
        rows, end = self.rows, self.past + embeds.shape[1]
        last = rows.prompt_end - 1 - self.past  # [B]
        columns, where = torch.unique(last, return_inverse=True)
        output = self.model(
            inputs_embeds=embeds,
            attention_mask=None if rows.unpadded else rows.prompt_mask,
            position_ids=rows.prompt_positions[:, self.past : end],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=columns,
            output_mtp_state=True,
            output_hidden_states=self.recorder.hidden_states,
        )
        logits = output.logits[torch.arange(len(last), device=last.device), where].float()
        first = self._first(logits)
        self.recorder.prompt(logits, output.hidden_states)
        chosen = self.model.get_input_embeddings()(first).to(embeds.dtype)
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, 1))
        embeds[torch.arange(len(last), device=last.device), last + 1] = chosen
        for row, token in enumerate(first.tolist()):
            self._append(row, [token])
        rows.chosen.copy_(first)
        self.drafter.start(output.mtp_state, embeds, self.past)

    def _first(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scorer.vectorised:
            scores = self.scorer.all(logits)
        else:
            scores = torch.stack([self.scorer.row(row, self._tokens(row), logits[row]) for row in range(len(logits))])
        self.recorder.scores(list(range(len(logits))), [scores[row : row + 1] for row in range(len(logits))])
        return choose(scores, self.config.do_sample)[0]

    # A step

    def _step(self, drafts: int) -> None:
        self.drafter.hold()
        graphs, refresh = self.cache.graphs, drafts == 0 and self.drafter.due
        plain = self.scorer.capturable and not self.recorder.wanted
        if plain and graphs is not None and graphs.take(drafts + 1):
            extent = max(max(self.rows.stands) + drafts + 1, self.drafter.reach(drafts))
            kind = ("step", len(self.rows.index), drafts, refresh, self.config.do_sample, self.cache.mtp_start > 0)
            layers = self.cache.layers
            settled = graphs.run(kind, layers, extent, lambda: self._judge(*self._forward(drafts, refresh)[1:]), ())
            output, results = None, _parted(settled)
        else:
            output, logits, drafted, drawn = self._forward(drafts, refresh)
            results = self._verify(logits, drafted, drawn)
        if drafts or refresh:
            self.drafter.missed = 0
        self._keep(output, *results)

    def _forward(self, drafts: int, refresh: bool) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Draft, and let the main model process the last token and the drafts: its output and its logits
        [B, k + 1, V], the drafts [B, k] and their distributions."""
        self.drafter.advance()
        if refresh:
            self.drafter.refresh()
        rows = self.rows
        drafted, drawn = self._draft(drafts)
        tokens = torch.cat((rows.chosen[:, None], drafted), dim=1)  # [B, k + 1]
        slots = rows.n[:, None] + torch.arange(drafts + 1, device=rows.n.device)
        context, mask, spans = self._placed(slots)
        with context:
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=slots + rows.ahead,
                past_key_values=self.cache,
                use_cache=True,
                mla_form="absorbed",
                mla_spans=spans,
                output_mtp_state=True,
                output_hidden_states=self.recorder.hidden_states,
            )
        self.drafter.fresh[:, : drafts + 1].copy_(output.mtp_state)
        return output, output.logits.float(), drafted, drawn

    def _placed(self, slots: torch.Tensor) -> tuple[AbstractContextManager[None], torch.Tensor | None, Any]:
        """How the main layers come to write tokens [B, T] into `slots`: a context for the forward, its mask and spans.

        Rows that stand alike need no places of their own: their tokens are appended as plain decoding's are.
        """
        rows, count = self.rows, slots.shape[1]
        low, extent = min(rows.stands) + count, max(rows.stands) + count
        graphs, layers = self.cache.graphs, self.cache.layers[: self.model.config.num_hidden_layers]
        spans = None if graphs is None else graphs.row_spans(layers, slots, extent)
        first = rows.abreast(0)
        if spans is None and first is not None:
            for layer in layers:
                layer.settle(first)
            return nullcontext(), None, None
        mask = None
        if spans is None:
            mask = rows.visible(slots, self.cache.shown(extent), window=self.cache.sliding_window)
        return self.cache.rows(RowSlots(slots, slots[:, -1] + 1, low, extent)), mask, spans

    def _draft(self, drafts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafts [B, k] and their distributions [B, k, V]."""
        if drafts == 0:
            return self.rows.n.new_empty(len(self.rows.index), 0), None
        tokens, drawn = self.drafter.draft(drafts, self._choose_draft)
        return tokens, None if drawn[0] is None else torch.stack(drawn, dim=1)  # type: ignore[arg-type]

    def _choose_draft(self, drafts: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.scorer.vectorised:
            scores = self.scorer.all(logits)
        else:
            scores = torch.stack(
                [
                    logits[i].float()
                    if self.done[row]
                    else self.scorer.look_ahead(row, self._tokens(row, drafts[i].tolist()), logits[i])
                    for i, row in enumerate(self.rows.index)
                ]
            )
        return choose(scores, self.config.do_sample)

    def _verify(
        self, logits: torch.Tensor, drafts: torch.Tensor, drawn: torch.Tensor | None
    ) -> tuple[list[list[int]], list[int], list[int]]:
        """The drafts of each row, how many it accepts and the token that follows; finished rows accept nothing."""
        if self.scorer.vectorised:
            return _parted(self._judge(logits, drafts, drawn))
        known, results = drafts.tolist(), []
        for i, row in enumerate(self.rows.index):
            own = None if drawn is None else drawn[i]
            results.append((0, 0) if self.done[row] else self._verify_row(row, logits[i], known[i], own))
        return known, [kept for kept, _ in results], [token for _, token in results]

    def _judge(self, logits: torch.Tensor, drafts: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor:
        """[B, 2 + k] of launches alone: drafts accepted, the token that follows them, and the drafts."""
        scores = self.scorer.all(logits.flatten(0, 1)).view_as(logits)
        if self.config.do_sample and drawn is None:
            drawn = scores.new_zeros(len(drafts), 0, scores.shape[-1])
        accepted, following = accept(scores, drafts, drawn)
        self.recorder.scores(self.rows.index, list(scores))
        return torch.cat((accepted[:, None], following[:, None], drafts), dim=1)

    def _verify_row(
        self, row: int, logits: torch.Tensor, drafts: list[int], drawn: torch.Tensor | None
    ) -> tuple[int, int]:
        """Position after position, as far as the drafts are right, so that processors see a plain decoding."""
        scores: list[torch.Tensor] = []
        for position, draft in enumerate([*drafts, None]):
            scores.append(self.scorer.row(row, self._tokens(row, drafts[:position]), logits[position]))
            if draft is None:
                token = int(choose(scores[-1][None], self.config.do_sample)[0])
                break
            right, token = accept_one(scores[-1], draft, None if drawn is None else drawn[position])
            # A row that a draft ends gets no further: the scores after it would be of no token.
            if not right or self._would_end(row, drafts[: position + 1]):
                position += int(right)
                break
        self.recorder.scores([row], [torch.stack(scores)])
        return position, token

    def _would_end(self, row: int, drafts: list[int]) -> bool:
        return self.stopper.ends_by_itself(drafts[-1], self.input_ids.shape[1] + len(self.new[row]) + len(drafts))

    def _keep(self, output: Any, drafts: list[list[int]], accepted: list[int], following: list[int]) -> None:
        """Give every unfinished row its tokens, and move it on."""
        kept, candidates, count = [], [], len(drafts[0])
        took_part = [i for i, row in enumerate(self.rows.index) if not self.done[row]]
        for i, (row, known) in enumerate(zip(self.rows.index, drafts, strict=True)):
            tokens = [*known[: accepted[i]], following[i]]
            kept.append(self._append(row, tokens) if i in took_part else 0)
            candidates.append([kept[-1], *tokens] + [0] * (count + 1 - len(tokens)))
        right = [accepted[i] for i in took_part]
        self.statistics.count(right, [kept[i] for i in took_part], count)
        self.policy.saw([self.rows.index[i] for i in took_part], right, count)
        self.recorder.step(self.rows.index, kept, output)
        self.drafter.take(candidates)
        self.rows.count(kept)

    # The end

    def _drop_finished(self) -> None:
        """Leave finished rows behind once they are half of the batch: copying half a cache then is amortised."""
        alive = [i for i, row in enumerate(self.rows.index) if not self.done[row]]
        if self.keep_cache or self.cache.max_cache_len is not None or 2 * len(alive) > len(self.rows.index):
            return
        keep = torch.tensor(alive, device=self.rows.n.device)
        self.rows.select(keep)
        self.drafter.select(keep)
        self.cache.batch_select_indices(keep)
        if self.cache.graphs is not None:
            self.cache.graphs.select(keep)

    def _finish(self) -> Any:
        longest = max(len(tokens) for tokens in self.new)
        pad = getattr(self.config, "_pad_token_tensor", None)
        padding = int(pad) if pad is not None else 0
        filled = [tokens + [padding] * (longest - len(tokens)) for tokens in self.new]
        new = torch.tensor(filled, dtype=torch.long, device=self.input_ids.device)
        sequences = torch.cat((self.input_ids, new), dim=1)
        if self.keep_cache:
            self._settle()
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateMtpOutput(
            sequences=sequences,  # type: ignore[arg-type]
            past_key_values=self.cache,
            mtp=self.statistics,
            **self.recorder.outputs(),
        )

    def _settle(self) -> None:
        """Leave the cache as a later call expects it: every module's rows up to date, no slot beyond the tokens."""
        self.drafter.hold()
        self.drafter.advance()
        self.drafter.refresh()
        self.cache.settle(max(self.rows.stands))


def _parted(settled: torch.Tensor) -> tuple[list[list[int]], list[int], list[int]]:
    """`_judge`'s result on the host, the step's one read of the device: drafts, how many count, what follows them."""
    rows = settled.tolist()
    return [row[2:] for row in rows], [row[0] for row in rows], [row[1] for row in rows]
