"""The MTP modules as a drafter over the latent cache, and where each row stands.

A row stands at slot n: the main model has processed the tokens in slots 0 .. n - 1 and chosen the one for slot n. The
first module's row i holds the state of token i and the embedding of token i + 1, so its cache ends one earlier than
what it has been told. Before each draft the last rows of every module are run again with what is known now, which
overwrites whatever earlier drafts left there; without drafts that happens every few steps.

What a step changes lies in tensors that keep their place, so that a graph may replay the step on them.

Letters: B rows, N window rows, D hidden, V vocabulary, k drafts.
"""

from typing import Any

import torch

from ..modeling_deepseek_v3.cache import LatentCache, RowSlots


class Rows:
    """Where the unfinished rows stand, on the device and on the host.

    Args:
        prompt_mask: [B, P] bool, which slots of the prompt hold tokens.
        prompt_positions: [B, P], their positions.
        past: slots that an earlier call filled.
        grows: whether the cache appends tokens to all that came before, without a window and a fixed length.

    Attributes:
        index: original row of each.
        plain: whether all slots of every row count, so that its tokens lie one after another.
        n: [B] slot of the token that was chosen last and not processed yet.
        chosen: [B] that token.
        prompt_end: [B] slot after the prompt's last token.
        stands: n, on the host.
        known_from: [B] first slot whose state was seen in this call; MTP rows before it stay as they are.
        known: known_from, on the host.
    """

    def __init__(self, prompt_mask: torch.Tensor, prompt_positions: torch.Tensor, past: int, grows: bool) -> None:
        columns = torch.arange(prompt_mask.shape[1], device=prompt_mask.device)
        self.index = list(range(len(prompt_mask)))
        self.unpadded = bool(prompt_mask.all())
        self.plain = self.unpadded and grows
        self.prompt_mask, self.prompt_positions = prompt_mask, prompt_positions
        self.prompt_end = torch.where(prompt_mask, columns + 1, 0).amax(dim=1)
        # What a slot after the prompt has to its position.
        self.ahead = prompt_positions.gather(1, self.prompt_end[:, None] - 1) + 1 - self.prompt_end[:, None]  # [B, 1]
        self.n = self.prompt_end.clone()
        self.chosen = torch.zeros_like(self.n)
        first = torch.where(prompt_mask, columns, prompt_mask.shape[1]).amin(dim=1)
        self.known_from = first.clamp(min=past)
        self.stands, self.known = torch.stack((self.n, self.known_from)).tolist()

    def select(self, keep: torch.Tensor) -> None:
        """Go on with the rows `keep` (positions among the present ones)."""
        self.index = [self.index[i] for i in keep.tolist()]
        for name in ("n", "chosen", "prompt_mask", "prompt_positions", "prompt_end", "ahead", "known_from"):
            setattr(self, name, getattr(self, name)[keep])
        self.stands, self.known = ([values[i] for i in keep.tolist()] for values in (self.stands, self.known))

    def count(self, kept: list[int]) -> None:
        """Every row has so many tokens more, on the host; `Drafter.advance` moves what is on the device."""
        self.stands = [n + more for n, more in zip(self.stands, kept, strict=True)]

    def reach(self, offset: int, count: int) -> tuple[int, int]:
        """Of `count` queries of every row from slot n + `offset` on, the last of them known: the least end of a row,
        and the slots that all take, those that run for nothing after the others."""
        ends = [n + offset + count for n in self.stands]
        unknown = [max(first - (n + offset), 0) for n, first in zip(self.stands, self.known, strict=True)]
        return min(ends), max(end + more for end, more in zip(ends, unknown, strict=True))

    def abreast(self, offset: int) -> int | None:
        """Slot n + `offset` of every row, where it is the same one and each row's slots up to there are all known."""
        first = min(self.stands) + offset
        alike = self.plain and max(self.stands) + offset == first and first >= max(self.known)
        return first if alike else None

    def position_ids(self, slots: torch.Tensor) -> torch.Tensor:
        """Positions of the tokens in [B, T] slots: the prompt's own, then one after another."""
        inside = self.prompt_positions.gather(1, slots.clamp(0, self.prompt_positions.shape[1] - 1))
        return torch.where(slots < self.prompt_end[:, None], inside, slots + self.ahead)

    def visible(self, queries: torch.Tensor, shown: range, start: int = 0, window: int | None = None) -> torch.Tensor:
        """[B, 1, T, len(shown)] mask: which of the slots `shown` a query in each of `queries` [B, T] slots may look
        at, from slot `start` and in its `window`."""
        slots = torch.arange(shown.start, shown.stop, device=queries.device)
        real = slots[None] >= self.prompt_end[:, None]  # [B, S]
        inside = self.prompt_mask[:, shown.start : shown.stop]
        real[:, : inside.shape[1]] |= inside
        real &= slots >= start
        seen = real[:, None] & (slots <= queries[..., None])
        if window is not None:
            seen &= slots > queries[..., None] - window
        return seen[:, None]


class Drafter:
    """Drafts tokens for every row with the model's MTP modules.

    Args:
        model: a causal LM with `draft`, `lm_head` and input embeddings.
        cache: the call's cache; the modules' layers come after the main model's.
        rows: where the rows stand.
        deepest: drafts a step at most.
        idle: tokens that a row may get while nothing is drafted before the modules run over them all at once.
    """

    def __init__(self, model: Any, cache: LatentCache, rows: Rows, deepest: int, idle: int = 0) -> None:
        self.model, self.cache, self.rows = model, cache, rows
        self.first_layer = model.config.num_hidden_layers
        self.modules = min(max(deepest, 1), model.config.num_nextn_predict_layers)
        self.window = deepest + self.modules + idle  # rows of each module that are run again at most
        self.embed = model.get_input_embeddings()
        # [B, ring, D], of slots n - window .. n - 1 and of those one later, slot s in place s % ring. A step writes
        # deepest + 1 places, right or not, and what is not right must not lie over what is in the window.
        self.ring = self.window + deepest + 1
        self.states = self.embeddings = torch.empty(0)
        self.fresh = torch.empty(0)  # [B, deepest + 1, D], states of slots n .. n + deepest, not all of them valid
        # [B, 1 + deepest + 1]: how many tokens a row was given beyond slot n and not moved on by, and the tokens.
        self.settled = rows.n.new_zeros(len(rows.index), deepest + 2)
        self.missed = deepest + self.modules  # tokens that a row was given at most since the modules ran
        # What `_slots` and `_places` add to n and index rows with: -window .. deepest, and 0 .. B - 1 in a column.
        self.around = torch.arange(-self.window, deepest + 1, device=rows.n.device)
        self.batch = torch.arange(len(rows.index), device=rows.n.device)[:, None]

    def start(self, states: torch.Tensor, embeddings: torch.Tensor, past: int) -> None:
        """Run the modules over the prompt, as far as its tokens are known.

        Args:
            states: [B, N, D], `mtp_state` of the prompt's new slots past .. past + N - 1.
            embeddings: [B, N + 1, D], embeddings of slots past .. past + N, the chosen token's at each row's end.
            past: slots that an earlier call filled.
        """
        count, end = states.shape[1], past + states.shape[1]
        following = torch.nn.functional.pad(embeddings[:, 1:], (0, 0, 0, self.modules))
        queries = torch.arange(past, end, device=states.device).expand(len(states), -1)
        follows_on = int(self.cache.get_seq_length(self.first_layer)) == past
        if not follows_on:
            self.cache.mtp_start = past  # the earlier call filled the main layers alone
            self.cache.hold(past)
        previous = states
        for module in range(self.modules):
            # Rows near the end would look at tokens that are not known: `draft` runs them again.
            embeds = following[:, module : module + count]
            if follows_on:
                mask, positions = self.rows.prompt_mask[:, :end], self.rows.prompt_positions[:, past:end]
                _, previous = self.model.draft(module, previous, embeds, mask, positions, self.cache)
            else:
                _, previous = self._run(module, previous, embeds, queries)
        self._fill(states, embeddings, past)
        self.fresh = self.states.new_zeros(len(states), self.settled.shape[1] - 1, states.shape[2])

    def _fill(self, states: torch.Tensor, embeddings: torch.Tensor, past: int) -> None:
        """Put the last `window` states before each row's n, and the embeddings of the slots after them, in place."""
        batch, places = self._places(self._slots(-self.window, 0))
        at = (self.rows.n - past)[:, None] + torch.arange(-self.window, 0, device=states.device)
        self.states = states.new_zeros(len(states), self.ring, states.shape[2])
        self.embeddings = self.states.clone()
        self.states[batch, places] = states[batch, at.clamp(min=0)]
        self.embeddings[batch, places] = embeddings[batch, (at + 1).clamp(min=0)]

    def _slots(self, start: int, stop: int) -> torch.Tensor:
        """[B, stop - start], slots n + start .. n + stop - 1."""
        return self.rows.n[:, None] + self.around[start + self.window : stop + self.window]

    def _places(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices [B, 1] and [B, .] of [B, .] slots in what goes round."""
        return self.batch[: len(slots)], slots % self.ring

    def draft(self, count: int, choose: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Draft `count` tokens for every row.

        Args:
            count: at least 1.
            choose: takes (drafts so far [B, j], logits [B, V]) and gives tokens [B] and their distribution.

        Returns:
            Drafts [B, count], and each one's distribution [B, V] (None if greedy).
        """
        drafts, drawn = self.rows.n.new_empty(len(self.rows.index), 0), []
        again, window, following, previous = self._known_rows()
        for depth in range(max(count, self.modules)):
            if depth < self.modules:
                embeds = following[:, depth : depth + again]
                normed, previous = self._run(depth, previous, embeds, window, -again)
                carry = previous[:, -1:]
            else:  # the last module again, on its own output, one row further each time
                offset = depth - self.modules
                embeds = self.embed(drafts[:, -1:])
                normed, carry = self._run(self.modules - 1, carry, embeds, self._slots(offset, offset + 1), offset)
            if depth >= count:
                continue  # a module that drafts nothing in this step
            tokens, distribution = choose(drafts, self.model.lm_head(normed[:, -1]))
            drafts = torch.cat((drafts, tokens[:, None]), dim=1)
            drawn.append(distribution)
            if depth + 1 < self.modules:
                following[:, again + depth] = self.embed(tokens)
        return drafts, drawn

    def refresh(self) -> None:
        """Bring the modules' caches up to date, as far as the tokens are known."""
        again, window, following, previous = self._known_rows()
        for module in range(self.modules):
            _, previous = self._run(module, previous, following[:, module : module + again], window, -again)

    def _known_rows(self) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows that are run again before n: how many, their slots [B, r], the embeddings after them [B, r +
        modules, D], zeros where no token is known, and their states [B, r, D]."""
        again = self._again
        window = self._slots(-again, 0)
        places = self._places(window)
        following = torch.nn.functional.pad(self.embeddings[places], (0, 0, 0, self.modules))
        return again, window, following, self.states[places]

    @property
    def _again(self) -> int:
        """Rows of each module that are run again: those whose tokens were not known, or all that a graph may need."""
        return self.window if self.cache.graphs is not None else min(self.missed + self.modules - 1, self.window)

    @property
    def due(self) -> bool:
        """Whether the modules must run now, or rows will be missed."""
        return self.missed + self.modules - 1 >= self.window

    def _run(
        self,
        module: int,
        previous: torch.Tensor,
        embeds: torch.Tensor,
        queries: torch.Tensor,
        offset: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One module on rows in slots `queries` [B, N], which begin at n + `offset` or, in a prompt, anywhere. Rows
        before what is known in this call run for nothing, out of sight: beyond the last valid slot, which is cleared.
        """
        appended = None if offset is None else self._append(module, previous, embeds, queries, offset)
        if appended is not None:
            return appended
        rows = self.rows
        known = queries >= rows.known_from[:, None]
        end = torch.where(known, queries + 1, 0).amax(dim=1)
        scratch = end[:, None] + torch.arange(queries.shape[1], device=queries.device)
        slots = torch.where(known, queries, scratch)
        graphs = self.cache.graphs
        if offset is None:
            low, extent = torch.stack((end.min(), slots.max() + 1)).tolist()
            spans = None
        else:
            low, extent = rows.reach(offset, queries.shape[1])
            layers = self.cache.layers[self.first_layer + module :][:1]
            spans = None if graphs is None else graphs.row_spans(layers, slots, extent, self.cache.mtp_start)
        mask = None
        if spans is None:
            mask = rows.visible(slots, self.cache.shown(extent), self.cache.mtp_start, self.cache.sliding_window)
        positions = rows.position_ids(queries.clamp(min=0))
        with self.cache.rows(RowSlots(slots, end, low, extent)):
            return self.model.draft(module, previous, embeds, mask, positions, self.cache, "absorbed", spans)

    def _append(
        self, module: int, previous: torch.Tensor, embeds: torch.Tensor, queries: torch.Tensor, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As `_run`, where the rows stand alike and need no places of their own; None where they do not."""
        rows, index = self.rows, self.first_layer + module
        first = rows.abreast(offset)
        if first is None or self.cache.mtp_start or self.cache.graphs is not None:
            return None
        if int(self.cache.get_seq_length(index)) < first:
            return None  # the module has missed tokens
        self.cache.layers[index].settle(first)
        inside = first < rows.prompt_mask.shape[1]
        positions = rows.position_ids(queries) if inside else queries + rows.ahead
        return self.model.draft(module, previous, embeds, None, positions, self.cache, "absorbed")

    def hold(self) -> None:
        """Keep in the cache whatever a row may still look at, the rows that are run again included."""
        self.cache.hold(max(0, min(self.rows.stands) - self.window))

    def reach(self, count: int) -> int:
        """Slots that `draft(count)` takes at most."""
        again = range(max(count - self.modules, 0))
        ends = [self.rows.reach(-self.window, self.window), *(self.rows.reach(offset, 1) for offset in again)]
        return max(extent for _, extent in ends)

    def take(self, settled: list[list[int]]) -> None:
        """Take what a verification settled: for each row how many tokens it keeps (0 for one that takes no part), and
        k + 1 tokens from slot n + 1 on, right as far as they are kept."""
        new = torch.tensor(settled)
        self.missed += max(row[0] for row in settled)
        self.settled[:, : new.shape[1]].copy_(new, non_blocking=True)

    def advance(self) -> None:
        """Move the rows on by what was taken; nothing where nothing was."""
        rows, kept, tokens = self.rows, self.settled[:, 0], self.settled[:, 1:]
        places = self._places(self._slots(0, tokens.shape[1]))
        self.states.index_put_(places, self.fresh)
        self.embeddings.index_put_(places, self.embed(tokens))
        last = tokens.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        rows.chosen.copy_(torch.where(kept > 0, last, rows.chosen))
        rows.n.add_(kept)
        kept.zero_()

    def select(self, keep: torch.Tensor) -> None:
        """Go on with some of the rows."""
        for name in ("states", "embeddings", "fresh", "settled"):
            setattr(self, name, getattr(self, name)[keep])
