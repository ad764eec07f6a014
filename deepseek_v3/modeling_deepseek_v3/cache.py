"""`LatentCache`: the normalised latent and the rotated shared key, and nothing else, a token and a layer.

Special about it: both lie side by side in one tensor, as absorbed attention and the decode kernels read them. `keys`
and `values`, the names that every transformers cache has, are views of what is valid (copies, where latents are kept
in FP8). MTP modules have their layers after the main model's, made when they are first written to.

Letters: B batch, T new tokens, S cached tokens, C kv_lora_rank, R qk_rope_head_dim, W sliding window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from .cache_growing import LatentLayer
from .cache_layers import Extension, RowSlots, StaticLatentLayer, StoredLayer
from .latents import Latents


class LatentCache(DynamicCache):
    """Cache of latents for `generate` and `forward`; what `generate` makes when no cache is given.

    A `DynamicCache` for whoever asks, with layers of its own.

    Args:
        config: the model's configuration, which tells `bytes_per_token`.
        max_cache_len: fixed length in tokens, allocated once and written in place (for `torch.compile` and graphs);
            None for storage that grows.
        offloading: keep each layer on the CPU between its uses (CUDA only).
        dtype: torch.float8_e4m3fn, or its name, keeps latents as E4M3 codes with a float32 scale for 128 channels
            (amax / 448), the rotated keys in the model's dtype: 656 bytes a token and layer for DeepSeek-V3 in BF16.
            Attention reads what the codes stand for, of the newest token too. None keeps the model's dtype.
        sliding_window: each token sees so many slots at most, itself included. Storage that grows stops growing at
            about twice that (for rows of different lengths: at what the one furthest behind needs); None for all.

    Raises:
        ValueError: another dtype, a length or window below 1.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int | None = None,
        offloading: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        sliding_window: int | None = None,
    ) -> None:
        if dtype == "float8_e4m3fn":
            dtype = torch.float8_e4m3fn
        if dtype not in (None, torch.float8_e4m3fn):
            raise ValueError(f"dtype = {dtype}: a LatentCache keeps the model's own (None) or torch.float8_e4m3fn")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window = {sliding_window}: a token sees at least itself, 1")
        self.config, self.max_cache_len = config, max_cache_len
        self.dtype, self.sliding_window = dtype, sliding_window
        self._rows: RowSlots | None = None
        # The captured decode steps of the `generate` call in progress, where it has any.
        self.graphs: Any = None
        self._expected = 0
        self._held: int | None = None
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
        coded, window = self.dtype is not None, self.sliding_window
        if self.max_cache_len is not None:
            return StaticLatentLayer(self.max_cache_len, coded, window)
        layer = LatentLayer(coded, window)
        layer.expected, layer.held = self._expected, self._held
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

    def extension(
        self, batch: int, tokens: int, layer_idx: int, dtype: torch.dtype, counted: torch.Tensor | None = None
    ) -> Extension | None:
        """Where `tokens` new ones of each sequence go, for `extend`; None where only `update` can write them.

        counted: [1, T], the new tokens' numbers in their sequence, if there is such a tensor.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if self.offloading or layer is None or not layer.is_initialized or layer.dtype != dtype:
            return None
        if self._rows is not None:
            first = self.first_of_rows()
            return Extension(self._rows.slots - first, self._rows.extent, first=first)
        seen, first = layer.get_seq_length(), layer.get_mask_sizes(tokens)[1]
        if isinstance(seen, int):
            if counted is not None and first == 0:
                return Extension(counted.expand(batch, -1), seen + tokens)
            slots = torch.arange(seen - first, seen - first + tokens, device=layer.device)
            return Extension(slots.expand(batch, -1), seen + tokens, first=first)
        slots = torch.arange(tokens, device=layer.device) + seen
        return Extension(slots.expand(batch, -1), None)

    def extend(self, layer_idx: int, extension: Extension) -> Latents:
        """Count new tokens in a layer; the caller writes them to the slots of the views [B, S, .] it gets.

        What lies in other slots than a row's own is not cleared: only a kernel that reads none of them may follow.
        """
        return self.layers[layer_idx].extend(extension)  # type: ignore[attr-defined]

    def opened(self, layer_idx: int, extension: Extension) -> tuple[Latents, int]:
        """As `extend`, and how many slots of the views count: they are the same ones at every step, where they can."""
        return self.layers[layer_idx].opened(extension)  # type: ignore[attr-defined]

    def hold(self, slot: int | None) -> None:
        """Let a window drop nothing that a token in `slot` or later may see, for rows that are behind; None for what
        a token after the last one sees."""
        self._held = slot
        for layer in self.layers:
            if isinstance(layer, LatentLayer):
                layer.held = slot

    def first_of_rows(self) -> int:
        """The first slot that rows of their own lengths are shown; see `hold`."""
        if self.sliding_window is None or self.max_cache_len is not None or self._held is None:
            return 0
        return max(0, self._held + 1 - self.sliding_window)

    @property
    def has_rows(self) -> bool:
        """Whether rows write at their own slots now; see `rows`."""
        return self._rows is not None

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

    def shown(self, extent: int) -> range:
        """Slots that rows of their own lengths are shown when `extent` of them are in use: all of a fixed cache's."""
        return range(self.first_of_rows(), extent) if self.max_cache_len is None else range(self.max_cache_len)

    def settle(self, length: int) -> None:
        """Say how many slots count from now on, in every layer."""
        for layer in self.layers:
            layer.settle(length)

    def _stored(self) -> list[LatentLayer | StaticLatentLayer]:
        return [layer for layer in self.layers if isinstance(layer, StoredLayer) and layer.is_initialized]  # type: ignore[misc]

    def nbytes(self) -> int:
        """Bytes of the cached tokens over all layers (a fixed cache: of its whole length; a window: of what is in
        it)."""
        return sum(layer.batch_size * layer.tokens * layer.format.nbytes for layer in self._stored())

    def bytes_per_token(self) -> int:
        """Bytes one token of one sequence takes over the layers that hold any; 0 while the cache is empty."""
        return sum(layer.format.nbytes for layer in self._stored())


def joint_latents(cache: Cache | None, layer_idx: int, latents: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[B, S, C + R] of what `update` gave for a layer: a view where the cache keeps both together, else a copy."""
    layer = cache.layers[layer_idx] if isinstance(cache, LatentCache) and not cache.offloading else None
    joint = layer.joint(latents[0].shape[2]) if isinstance(layer, LatentLayer | StaticLatentLayer) else None
    return torch.cat(latents, dim=-1)[:, 0] if joint is None else joint


def check_cache(cache: Cache, config: Any, batch_size: int) -> None:
    """Refuse a cache that another model or another batch has filled.

    Raises:
        ValueError: latent width or batch size differ from the model's and the input's.
    """
    layer = next((layer for layer in cache.layers if getattr(layer, "is_initialized", False)), None)
    if isinstance(layer, LatentLayer | StaticLatentLayer):
        shape = (layer.batch_size, 1, layer.tokens, layer.format.rank)  # its `keys` may be a copy
    else:
        keys = getattr(layer, "keys", None)
        if keys is None or keys.dim() != 4:
            return
        shape = tuple(keys.shape)
    if shape[1] != 1 or shape[-1] != config.kv_lora_rank:
        raise ValueError(
            f"past_key_values holds tensors of shape {shape}; this model caches latents of shape "
            f"[batch, 1, tokens, {config.kv_lora_rank}]. Pass a cache that this model filled, or none"
        )
    if shape[0] != batch_size:
        raise ValueError(
            f"past_key_values holds {shape[0]} sequences and the input has {batch_size}. Use "
            "batch_repeat_interleave or batch_select_indices on the cache, or reset() it"
        )
