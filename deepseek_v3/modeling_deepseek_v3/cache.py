"""`LatentCache`: the normalised latent and the rotated shared key, and nothing else, a token and a layer.

Special about it: both lie side by side in one tensor, as absorbed attention and the decode kernels read them, and
that tensor grows by half of itself when it is full, so that a decode step writes its own token and copies no history.
`keys` and `values`, the names that every transformers cache has, are views of what is valid. MTP modules have their
layers after the main model's, made when they are first written to.

Letters: B batch, T new tokens, S cached tokens, C kv_lora_rank, R qk_rope_head_dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling

_ROOM = 64  # tokens: the least that storage grows by, and what its length is a multiple of
_AHEAD = 1024  # tokens: what is made room for at once where a sequence may come to so many


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

    slots: [B, T], int64.
    extent: slots in use afterwards; None where the slots of a fixed cache say it.
    whole: show all of the storage instead of the slots in use, so that the view is the same one at every step.
    """

    slots: torch.Tensor
    extent: int | None
    whole: bool = False


def _write_rows(storage: torch.Tensor, new: torch.Tensor, rows: RowSlots) -> None:
    """Scatter `new` [B, T, C + R] into `storage` [B, 1, S, C + R] and clear what no row may see.

    Attention multiplies a masked slot by a weight of zero, which a NaN would survive: rejected drafts and storage
    that was never written are cleared where rows of different lengths show them.
    """
    batch = torch.arange(new.shape[0], device=new.device)[:, None]
    storage[batch, 0, rows.slots] = new
    if rows.extent > rows.low:
        slots = torch.arange(rows.low, rows.extent, device=new.device)
        dead = slots[None] >= rows.end[:, None]
        storage[:, 0, rows.low : rows.extent].masked_fill_(dead[..., None], 0)


class LatentLayer(CacheLayerMixin):
    """One layer's latents: `keys` [B, 1, S, C] and `values` [B, 1, S, R], views into storage with room to grow."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        self._storage: torch.Tensor | None = None  # [B, 1, capacity, C + R]
        self._rank = 0  # C
        self._length = 0
        self.expected = 0  # tokens that the sequence may come to
        self.is_initialized = False

    def joint(self) -> torch.Tensor:
        """[B, S, C + R]: latent and rotated key of every cached token, a view."""
        assert self._storage is not None
        return self._storage[:, 0, : self._length]

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._storage is None else self._storage[:, :, : self._length, : self._rank]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._storage is None else self._storage[:, :, : self._length, self._rank :]

    @property
    def batch_size(self) -> int:
        return -1 if self._storage is None else self._storage.shape[0]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._rank, self._length = key_states.shape[-1], 0
        width = self._rank + value_states.shape[-1]
        self._storage = key_states.new_empty((key_states.shape[0], key_states.shape[1], 0, width))
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        rows: RowSlots | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T tokens, or write each row's where `rows` says; return views of [B, 1, S + T, C] and [.., R].

        Where a gradient is asked for, the result is a concatenation: writing in place would invalidate what an
        earlier forward saved for its backward.
        """
        if self._storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self._storage is not None
        if rows is not None:
            self._reserve(rows.extent)
            self._storage[:, :, self._length : rows.low] = 0  # nothing, if the layer saw every token
            _write_rows(self._storage, torch.cat((key_states, value_states), dim=-1)[:, 0], rows)
            self._length = rows.extent
            return self.keys, self.values  # type: ignore[return-value]
        start, end = self._length, self._length + key_states.shape[2]
        if torch.is_grad_enabled() and (key_states.requires_grad or self._storage.requires_grad):
            new = torch.cat((key_states, value_states), dim=-1)
            self._storage = torch.cat((self._storage[:, :, :start], new), dim=2)
        else:
            self._reserve(end)
            self._storage[:, :, start:end, : self._rank] = key_states
            self._storage[:, :, start:end, self._rank :] = value_states
        self._length = end
        return self.keys, self.values  # type: ignore[return-value]

    def extend(self, extension: Extension) -> torch.Tensor:
        """Count new tokens whose slots the caller fills; return the view [B, S + T, C + R] to write them into."""
        assert extension.extent is not None
        self.count(extension.extent)
        assert self._storage is not None
        return self._storage[:, 0] if extension.whole else self.joint()

    def count(self, extent: int) -> None:
        """Make room for `extent` tokens and count them all, whatever their slots hold."""
        self._reserve(extent)
        self._length = extent

    @property
    def address(self) -> int:
        """Where the storage lies; it moves when it grows."""
        return 0 if self._storage is None else self._storage.data_ptr()

    def _reserve(self, end: int) -> None:
        """Make room for `end` tokens, half as much again where it has to grow."""
        old = self._storage
        assert old is not None
        if end <= old.shape[2] and not _frozen(old):
            return
        capacity = max(end + _ROOM, end + end // 2)
        # Not all at once on the word of a caller whose sequence may end long before.
        capacity = max(capacity, min(self.expected, max(2 * capacity, end + _AHEAD)))
        capacity += -capacity % _ROOM
        # Zeros: rows of different lengths show slots that nothing was written to.
        self._storage = old.new_zeros((old.shape[0], old.shape[1], capacity, old.shape[3]))
        self._storage[:, :, : self._length] = old[:, :, : self._length].detach()

    def settle(self, length: int) -> None:
        """Say how many slots count from now on, after rows were written at their own places."""
        self._length = min(self._length, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; storage stays, nothing is copied.

        Raises:
            ValueError: a positive number, which once meant a final length.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end")
        self._length = max(0, self._length + tokens_to_remove)

    def reset(self) -> None:
        """Forget every token, and the storage with them: the next sequence may have another batch size."""
        self._storage, self._length, self.is_initialized = None, 0, False

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


def _frozen(tensor: torch.Tensor) -> bool:
    if is_torchdynamo_compiling():
        return False
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


class StaticLatentLayer(StaticLayer):
    """A layer of fixed length, its latents and rotated keys side by side in one tensor that never moves."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        rank, width = key_states.shape[-1], key_states.shape[-1] + value_states.shape[-1]
        self._storage = key_states.new_zeros((*self.keys.shape[:3], width))  # type: ignore[union-attr]
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(self._storage)
        self.keys, self.values = self._storage[..., :rank], self._storage[..., rank:]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        rows: RowSlots | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the base class, or each row's tokens where `rows` says."""
        if rows is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        _write_rows(self._storage, torch.cat((key_states, value_states), dim=-1)[:, 0], rows)
        self.settle(rows.extent)
        return self.keys, self.values  # type: ignore[return-value]

    def extend(self, extension: Extension) -> torch.Tensor:
        """As of `LatentLayer`; every slot is there already."""
        if extension.extent is None:
            self.cumulative_length.add_(extension.slots.shape[1])
        else:
            self.settle(extension.extent)
        return self.joint()

    def settle(self, length: int) -> None:
        """Say how many slots count from now on, after rows were written at their own places."""
        self.cumulative_length.fill_(length)

    def joint(self) -> torch.Tensor:
        """[B, max_cache_len, C + R]: latent and rotated key of every slot, a view."""
        return self._storage[:, 0]


class LatentCache(DynamicCache):
    """Cache of latents for `generate` and `forward`; what `generate` makes when no cache is given.

    A `DynamicCache` for whoever asks, with layers of its own.

    Args:
        config: the model's configuration, which tells `bytes_per_token`.
        max_cache_len: fixed length in tokens, allocated once and written in place (for `torch.compile` and graphs);
            None for storage that grows.
        offloading: keep each layer on the CPU between its uses (CUDA only).
    """

    def __init__(self, config: Any, max_cache_len: int | None = None, offloading: bool = False) -> None:
        self.config, self.max_cache_len = config, max_cache_len
        self._rows: RowSlots | None = None
        # The captured decode steps of the `generate` call in progress, where it has any.
        self.graphs: Any = None
        self._expected = 0
        # The first token, in its own sequence's count, that the MTP modules' layers know of.
        self.mtp_start = 0
        if max_cache_len is None:
            Cache.__init__(self, layer_class_to_replicate=LatentLayer, offloading=offloading)
            return
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len = {max_cache_len}: a fixed cache holds at least 1 token")
        layers: list[Any] = [self._new_layer() for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers, offloading=offloading)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new latents [B, 1, T, C] and rotated keys [B, 1, T, R]; see `rows`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer())
        if self._rows is not None:
            kwargs["rows"] = self._rows
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _new_layer(self) -> LatentLayer | StaticLatentLayer:
        if self.max_cache_len is not None:
            return StaticLatentLayer(max_cache_len=self.max_cache_len)
        layer = LatentLayer()
        layer.expected = self._expected
        return layer

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Slots that attention over `query_length` new tokens is shown in a layer, and the first one's index."""
        if self.max_cache_len is not None and layer_idx >= len(self.layers):
            return self.max_cache_len, 0  # an MTP module's layer, before it is written
        return super().get_mask_sizes(query_length, layer_idx)

    def expect(self, tokens: int) -> None:
        """Say how many tokens a sequence may come to, so that storage grows once instead of by and by."""
        self._expected = tokens
        for layer in self.layers:
            layer.expected = tokens  # type: ignore[attr-defined]

    def extension(self, batch: int, tokens: int, layer_idx: int, dtype: torch.dtype) -> Extension | None:
        """Where `tokens` new ones of each sequence go, for `extend`; None where only `update` can write them."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if self.offloading or layer is None or not layer.is_initialized or layer.dtype != dtype:
            return None
        if self._rows is not None:
            return Extension(self._rows.slots, self._rows.extent)
        seen = layer.get_seq_length()
        if isinstance(seen, int):
            slots = torch.arange(seen, seen + tokens, device=layer.device)
            return Extension(slots.expand(batch, -1), seen + tokens)
        slots = torch.arange(tokens, device=layer.device) + seen
        return Extension(slots.expand(batch, -1), None)

    def extend(self, layer_idx: int, extension: Extension) -> torch.Tensor:
        """Count new tokens in a layer; the caller writes them to the slots of the view [B, S, C + R] it gets.

        What lies in other slots than a row's own is not cleared: only a kernel that reads none of them may follow.
        """
        return self.layers[layer_idx].extend(extension)  # type: ignore[attr-defined]

    @contextmanager
    def rows(self, rows: RowSlots) -> Iterator[None]:
        """Within this context every layer writes each row's tokens at that row's own slots, over what is there.

        Rows of a batch grow apart this way without moving or copying any history. The forward needs a 4-D mask that
        shows each row its own slots only.
        """
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def shown(self, extent: int) -> int:
        """Slots that attention is shown when `extent` of them are in use: all of a fixed cache's."""
        return extent if self.max_cache_len is None else self.max_cache_len

    def settle(self, length: int) -> None:
        """Say how many slots count from now on, in every layer."""
        for layer in self.layers:
            layer.settle(length)

    def _tensors(self) -> list[torch.Tensor]:
        layers = [layer for layer in self.layers if layer.is_initialized]
        return [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]

    def nbytes(self) -> int:
        """Bytes of the cached tokens over all layers (a fixed cache: of its whole length)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def bytes_per_token(self) -> int:
        """Bytes one token of one sequence takes over the layers that hold any; 0 while the cache is empty."""
        return sum(tensor.shape[-1] * tensor.element_size() for tensor in self._tensors())


def joint_latents(cache: Cache | None, layer_idx: int, latents: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[B, S, C + R] of a layer: a view where the cache keeps latents and keys together, else a copy."""
    layer = cache.layers[layer_idx] if isinstance(cache, LatentCache) else None
    if isinstance(layer, LatentLayer | StaticLatentLayer) and layer.keys is not None and not cache.offloading:  # type: ignore[union-attr]
        return layer.joint()
    return torch.cat(latents, dim=-1)[:, 0]


def check_cache(cache: Cache, config: Any, batch_size: int) -> None:
    """Refuse a cache that another model or another batch has filled.

    Raises:
        ValueError: latent width or batch size differ from the model's and the input's.
    """
    layer = next((layer for layer in cache.layers if getattr(layer, "is_initialized", False)), None)
    keys = getattr(layer, "keys", None)
    if keys is None or keys.dim() != 4:
        return
    if keys.shape[1] != 1 or keys.shape[-1] != config.kv_lora_rank:
        raise ValueError(
            f"past_key_values holds tensors of shape {tuple(keys.shape)}; this model caches latents of shape "
            f"[batch, 1, tokens, {config.kv_lora_rank}]. Pass a cache that this model filled, or none"
        )
    if keys.shape[0] != batch_size:
        raise ValueError(
            f"past_key_values holds {keys.shape[0]} sequences and the input has {batch_size}. Use "
            "batch_repeat_interleave or batch_select_indices on the cache, or reset() it"
        )
