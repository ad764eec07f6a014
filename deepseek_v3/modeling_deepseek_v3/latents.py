"""How a cached token lies in memory: latent beside rotated key, or E4M3 codes, their scales and the rotated key.

Special about it: a token is one row of one tensor in both forms, so that growing, moving and picking rows of a cache
is one operation whatever the form. In FP8 the rows are bytes: C codes, a float32 scale for each 128 of them, the
rotated key in the model's dtype; 656 bytes for DeepSeek-V3, in the order in which FlashMLA keeps them.

Letters: B batch, S cached tokens, C kv_lora_rank, R qk_rope_head_dim, G groups of 128 channels (the last short).
"""

from typing import NamedTuple

import torch

from ..kernels import dequantize_activation, quantize_activation

_GROUP = 128


class Latents(NamedTuple):
    """Cached tokens as kernels read and write them, views of a cache's storage.

    latent: [..., C] in the model's dtype, or float8_e4m3fn codes.
    rope: [..., R] in the model's dtype.
    scale: [..., G] float32, with codes alone.
    """

    latent: torch.Tensor
    rope: torch.Tensor
    scale: torch.Tensor | None = None

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent [..., C] and rope [..., R] in the model's dtype: themselves, or what the codes stand for."""
        if self.scale is None:
            return self.latent, self.rope
        return dequantize_activation(self.latent, self.scale, group=_GROUP, dtype=self.rope.dtype), self.rope


class TokenFormat:
    """The row of a token.

    Args:
        latent, rope: tokens [..., C] and [..., R] as the model gives them.
        coded: keep the latent as E4M3 codes.
    """

    def __init__(self, latent: torch.Tensor, rope: torch.Tensor, coded: bool) -> None:
        self.rank, self.dtype, self.coded = latent.shape[-1], latent.dtype, coded
        if not coded:
            self.storage_dtype, self.width = self.dtype, self.rank + rope.shape[-1]
            return
        size = self.dtype.itemsize
        # Each part begins, and the next row does, where a number of the part's own size may lie.
        self._scale = _aligned(self.rank, 4)
        self._rope = _aligned(self._scale + 4 * -(-self.rank // _GROUP), size)
        self.storage_dtype = torch.uint8
        self.width = _aligned(self._rope + size * rope.shape[-1], max(size, 4))
        self._end = self._rope + size * rope.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of one token."""
        return self.width * self.storage_dtype.itemsize

    def empty(self, batch: int, slots: int, device: torch.device) -> torch.Tensor:
        """Storage [B, 1, S, width], all zeros: rows of different lengths show slots that nothing was written to."""
        return torch.zeros((batch, 1, slots, self.width), dtype=self.storage_dtype, device=device)

    def parts(self, storage: torch.Tensor) -> Latents:
        """Views of storage [..., width]."""
        if not self.coded:
            return Latents(storage[..., : self.rank], storage[..., self.rank :])
        codes = storage[..., : self.rank].view(torch.float8_e4m3fn)
        scale = storage[..., self._scale : self._scale + 4 * -(-self.rank // _GROUP)].view(torch.float32)
        return Latents(codes, storage[..., self._rope : self._end].view(self.dtype), scale)

    def pairs(
        self, storage: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each part of storage with what is to be written to it for tokens [..., C] and [..., R]."""
        views = self.parts(storage)
        if not self.coded:
            return [(views.latent, latent), (views.rope, rope)]
        codes, scale = quantize_activation(latent, group=_GROUP)
        assert views.scale is not None
        # As bytes, for which torch has every kind of copy.
        bytes_ = (views.latent.view(torch.uint8), codes.view(torch.uint8))
        return [bytes_, (views.scale, scale), (views.rope, rope.to(self.dtype))]


def _aligned(size: int, unit: int) -> int:
    return size + -size % unit
