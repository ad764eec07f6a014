"""A layer of a `LatentCache` whose storage grows, and the same under a sliding window.

Special about it: storage grows by half of itself when it is full, so that a decode step writes its own token and
copies no history. Under a window it stops growing at a little more than twice the window: what no query can see any
more is then dropped and the rest moved to the front, once in a window of tokens. Slots are counted from the
sequence's first token on all along; `origin` is the one that storage begins with.

Letters: B batch, T new tokens, S cached tokens, C kv_lora_rank, R qk_rope_head_dim, W sliding window.
"""

from typing import Any

import torch
from transformers.utils.import_utils import is_torchdynamo_compiling

from .cache_layers import Extension, RowSlots, StoredLayer
from .latents import Latents

_ROOM = 64  # tokens: the least that storage grows by, what its length is a multiple of, and how far a crop may go back
_AHEAD = 1024  # tokens: what is made room for at once where a sequence may come to so many


class LatentLayer(StoredLayer):
    """One layer's latents in storage with room to grow; `keys` [B, 1, S, C] and `values` [B, 1, S, R] are what the
    next token may see. Under a window S is at most W."""

    is_compileable = False

    def __init__(self, coded: bool = False, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(coded, window)
        self._length = 0
        self._views: tuple[torch.Tensor, Latents] | None = None  # of the storage that they were made for
        self.origin = 0
        self.place: torch.Tensor | None = None  # origin on the device, where a replayed step reads it; windows alone
        self.expected = 0  # tokens that the sequence may come to
        self.held: int | None = None  # the first slot that may still be written or asked from; None for the end

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._storage is None else self._shown()[0]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._storage is None else self._shown()[1]

    def _shown(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._plain(self._length - self.tokens - self.origin, self._length - self.origin)

    @property
    def tokens(self) -> int:
        """Cached tokens of a sequence that a query may still see."""
        return self._length if self.window is None else min(self._length, self.window)

    def joint(self, count: int | None = None) -> torch.Tensor | None:
        """[B, S, C + R]: latent and rotated key of the newest `count` tokens (all that count), a view; None where they
        do not lie side by side."""
        start = self._length - self.origin - (self.tokens if count is None else count)
        if self.coded or self._storage is None or start < 0:
            return None
        return self._storage[:, 0, start : self._length - self.origin]

    def first(self, seen: int) -> int:
        """The first slot that tokens after the first `seen` are shown."""
        if self.window is None:
            return 0
        return max(0, (seen if self.held is None else self.held) + 1 - self.window)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._start(key_states, value_states, 0)
        self._length = self.origin = 0
        if self.window is not None:
            self.place = torch.zeros((), dtype=torch.int64, device=key_states.device)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        rows: RowSlots | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T tokens, or write each row's where `rows` says; return [B, 1, S + T, C] and [.., R] of what they are
        shown, views where nothing is coded.

        Where a gradient is asked for, the result is a concatenation: writing in place would invalidate what an
        earlier forward saved for its backward.

        Raises:
            ValueError: a gradient is asked for and the cache keeps codes, through which none flows.
        """
        if self._storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self._storage is not None
        wants_gradient = torch.is_grad_enabled() and (key_states.requires_grad or self._storage.requires_grad)
        if wants_gradient and self.coded:
            raise ValueError("a LatentCache of float8_e4m3fn has no gradient; run the model under torch.no_grad()")
        seen, first = self._length, self.first(self._length)
        if rows is not None:
            self.reserve(rows.extent)
            self._storage[:, :, max(seen - self.origin, 0) : rows.low - self.origin] = 0  # layers that missed tokens
            self._write_rows(key_states, value_states, rows, self.origin)
            self._length = rows.extent
        elif wants_gradient:
            start, self._length = seen - self.origin, seen + key_states.shape[2]
            new = torch.cat((key_states, value_states), dim=-1)
            self._storage = torch.cat((self._storage[:, :, :start], new), dim=2)
        else:
            self.reserve(seen + key_states.shape[2])
            self._length = seen + key_states.shape[2]
            new_rows = self._storage[:, :, seen - self.origin : self._length - self.origin]
            for view, new in self.format.pairs(new_rows, key_states, value_states):
                view.copy_(new)
        shown = self._plain(first - self.origin, self._length - self.origin)
        if rows is None and self.window is not None:
            self._trim()
        return shown

    def extend(self, extension: Extension) -> Latents:
        """Count new tokens whose slots the caller fills; return views [B, S + T, .] to write them into."""
        assert extension.extent is not None
        self.count(extension.extent)
        assert self._storage is not None
        storage = self._storage[:, 0]
        if not extension.whole:
            storage = storage[:, extension.first - self.origin : self._length - self.origin]
        return self.format.parts(storage)

    def opened(self, extension: Extension) -> tuple[Latents, int]:
        """As `extend`, with views of the whole storage where they begin with the same slot, and how many slots of the
        views count."""
        if extension.first != self.origin and not extension.whole:
            held = self.extend(extension)
            return held, held.latent.shape[1]
        assert extension.extent is not None
        self.count(extension.extent)
        storage = self._storage
        assert storage is not None
        if self._views is None or self._views[0] is not storage:
            self._views = storage, self.format.parts(storage[:, 0])
        return self._views[1], storage.shape[2] if extension.whole else self._length - self.origin

    def count(self, extent: int) -> None:
        """Make room for `extent` tokens and count them all, whatever their slots hold."""
        self.reserve(extent)
        self._length = extent

    @property
    def _limit(self) -> int:
        """Slots beyond which a window's storage drops tokens rather than grow."""
        assert self.window is not None
        return 2 * (self.window + -self.window % _ROOM + _ROOM)

    def reserve(self, end: int) -> None:
        """Make room for the slots below `end`: half as much again where storage has to grow, or drop what is out of
        sight."""
        old = self._storage
        assert old is not None
        if end - self.origin <= old.shape[2] and not _frozen(old):
            return
        keep = self.origin
        if self.window is not None and end - self.origin > self._limit:
            keep = max(keep, self.first(self._length) - _ROOM)
        need = end - keep
        capacity = max(need + _ROOM, need + need // 2)
        # Not all at once on the word of a caller whose sequence may end long before.
        capacity = max(capacity, min(self.expected, max(2 * capacity, need + _AHEAD)))
        capacity += -capacity % _ROOM
        if self.window is not None:
            capacity = max(min(capacity, self._limit), need)
        kept = old[:, :, keep - self.origin : max(self._length, keep) - self.origin].detach()
        if keep > self.origin and old.shape[2] == capacity and not _frozen(old):
            old[:, :, : kept.shape[2]] = kept.clone()  # graphs replay on this address
        else:
            self._storage = self.format.empty(old.shape[0], capacity, old.device)
            self._storage[:, :, : kept.shape[2]] = kept
        self._settle_origin(keep)

    def _trim(self) -> None:
        """Drop what a prompt longer than the window leaves behind, storage and all."""
        old, keep = self._storage, max(self.origin, self.first(self._length) - _ROOM)
        if old is None or old.shape[2] <= self._limit or self._length - keep > self._limit:
            return
        self._storage = self.format.empty(old.shape[0], self._limit, old.device)
        self._storage[:, :, : self._length - keep] = old[:, :, keep - self.origin : self._length - self.origin]
        self._settle_origin(keep)

    def _settle_origin(self, origin: int) -> None:
        if origin != self.origin:
            self.origin = origin
            assert self.place is not None
            self.place.fill_(origin)

    def settle(self, length: int) -> None:
        """Say how many slots count from now on, after rows were written at their own places."""
        self._length = min(self._length, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self.first(self._length)
        return self._length + query_length - first, first

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; storage stays, nothing is copied.

        Raises:
            ValueError: a positive number, which once meant a final length; tokens before the removed ones are gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end")
        length = max(0, self._length + tokens_to_remove)
        if self.first(length) < self.origin:
            raise ValueError(
                f"crop({tokens_to_remove}): a cache with sliding_window = {self.window} has dropped what the tokens "
                f"after {length} would see; crop at most {_ROOM} tokens, or reset() it"
            )
        self._length = length

    def reset(self) -> None:
        """Forget every token, and the storage with them: the next sequence may have another batch size."""
        self._storage, self._views, self._length, self.origin, self.is_initialized = None, None, 0, 0, False


def _frozen(tensor: torch.Tensor) -> bool:
    if is_torchdynamo_compiling():
        return False
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
