"""A layer of a `LatentCache`: what every kind of storage shares, and storage of fixed length.

Letters: B batch, T new tokens, S cached tokens, C kv_lora_rank, R qk_rope_head_dim.
"""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.utils.import_utils import is_torchdynamo_compiling

from .latents import Latents, TokenFormat


class RowSlots(NamedTuple):
    """Where the rows of a batch write, each at its own place.

    slots: [B, T], int64, the slot of every new token.
    end: [B], int64; from there on a row's slots hold nothing valid.
    low: smallest `end` of any row.
    extent: slots that attention is shown, at least the largest written one + 1.
    """

    slots: torch.Tensor
    end: torch.Tensor
    low: int
    extent: int


class Extension(NamedTuple):
    """New tokens that a kernel writes into every layer: where they go, and how many slots then hold something.

    slots: [B, T], int64, counted from the first slot of the view that `extend` gives.
    extent: slots in use afterwards, of all; None where the slots of a fixed cache say it.
    whole: show all of the storage instead of the slots in use, so that the view is the same one at every step.
    first: slot that the view begins with, where it is not the whole storage.
    """

    slots: torch.Tensor
    extent: int | None
    whole: bool = False
    first: int = 0


class StoredLayer(CacheLayerMixin):
    """What both kinds of storage share: one tensor [B, 1, slots, width] whose rows are tokens.

    Args:
        coded: keep latents as E4M3 codes with scales.
        window: each query sees so many tokens at most, itself included; None for all.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, coded: bool = False, window: int | None = None, **kwargs: Any) -> None:
        self._storage: torch.Tensor | None = None
        self.format: TokenFormat = None  # type: ignore[assignment]
        self.coded, self.window = coded, window
        self.is_initialized = False

    def _start(self, key_states: torch.Tensor, value_states: torch.Tensor, slots: int) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.format = TokenFormat(key_states, value_states, self.coded)
        self._storage = self.format.empty(key_states.shape[0], slots, key_states.device)
        self.is_initialized = True

    def _plain(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 1, n, C] and keys [B, 1, n, R] of the rows `start` to `end` of the storage."""
        assert self._storage is not None
        return self.format.parts(self._storage[:, :, start:end]).plain()

    def _write_rows(self, key_states: torch.Tensor, value_states: torch.Tensor, rows: RowSlots, origin: int) -> None:
        """Scatter new tokens [B, 1, T, .] and clear what no row may see.

        Attention multiplies a masked slot by a weight of zero, which a NaN would survive: rejected drafts and storage
        that was never written are cleared where rows of different lengths show them.
        """
        assert self._storage is not None
        batch = torch.arange(key_states.shape[0], device=self._storage.device)[:, None]
        for view, new in self.format.pairs(self._storage[:, 0], key_states[:, 0], value_states[:, 0]):
            view[batch, rows.slots - origin] = new
        if rows.extent > rows.low:
            slots = torch.arange(rows.low, rows.extent, device=self._storage.device)
            dead = slots[None] >= rows.end[:, None]
            self._storage[:, 0, rows.low - origin : rows.extent - origin].masked_fill_(dead[..., None], 0)

    @property
    def batch_size(self) -> int:
        return -1 if self._storage is None else self._storage.shape[0]

    @property
    def address(self) -> int:
        """Where the storage lies; it moves when it grows."""
        return 0 if self._storage is None else self._storage.data_ptr()

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self._storage is not None:
            self._storage = self._storage.to(device, non_blocking=True)

    def _gather(self, indices: torch.Tensor) -> None:
        if self._storage is not None:
            self._storage = self._storage.index_select(0, indices.to(self._storage.device))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._gather(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`: positions, or a boolean mask over the batch."""
        self._gather(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._storage is not None:
            rows = torch.arange(self.batch_size, device=self._storage.device)
            self._gather(rows.repeat_interleave(repeats))


class StaticLatentLayer(StoredLayer):
    """A layer of fixed length in one tensor that never moves, written in place; every slot is shown."""

    is_compileable = True
    cumulative_length: torch.Tensor  # type: ignore[assignment]

    def __init__(self, max_cache_len: int, coded: bool = False, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(coded, window)
        self.max_cache_len = self.tokens = max_cache_len
        # A tensor, so that a compiled forward is not made again when it changes.
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._storage is None else self._plain(0, self.max_cache_len)[0]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._storage is None else self._plain(0, self.max_cache_len)[1]

    def joint(self, count: int | None = None) -> torch.Tensor | None:
        """[B, max_cache_len, C + R]: latent and rotated key of every slot, a view; None where they are coded."""
        return None if self.coded or self._storage is None else self._storage[:, 0]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._start(key_states, value_states, self.max_cache_len)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(self._storage)
            torch._dynamo.mark_static_address(self.cumulative_length)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        rows: RowSlots | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T tokens after the last ones, or each row's where `rows` says; return [B, 1, max_cache_len, C] and
        [.., R]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._storage is not None
        if rows is not None:
            self._write_rows(key_states, value_states, rows, 0)
            self.settle(rows.extent)
        else:
            count = key_states.shape[2]
            slots = torch.arange(count, device=self.device) + self.cumulative_length
            self.cumulative_length.add_(count)
            for view, new in self.format.pairs(self._storage, key_states, value_states):
                view.index_copy_(2, slots, new)
        return self._plain(0, self.max_cache_len)

    def _gather(self, indices: torch.Tensor) -> None:
        kept = self._storage
        super()._gather(indices)
        if kept is not None and self._storage.shape == kept.shape:  # type: ignore[union-attr]
            self._storage = kept.copy_(self._storage)  # type: ignore[arg-type]  # a compiled forward knows its place

    def extend(self, extension: Extension) -> Latents:
        """As of `LatentLayer`; every slot is there already."""
        assert self._storage is not None
        if extension.extent is None:
            self.cumulative_length.add_(extension.slots.shape[1])
        else:
            self.settle(extension.extent)
        return self.format.parts(self._storage[:, 0])

    def opened(self, extension: Extension) -> tuple[Latents, int]:
        """As of `LatentLayer`; every slot counts."""
        return self.extend(extension), self.max_cache_len

    def settle(self, length: int) -> None:
        """Say how many slots count from now on, after rows were written at their own places."""
        self.cumulative_length.fill_(length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end")
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def reset(self) -> None:
        """Forget every token; storage stays where it is."""
        if self._storage is not None:
            self._storage.zero_()
        self.cumulative_length.zero_()
