"""Launchers of RMSNorm, rotary embedding and the write of new latents."""

import torch

from ..reference.norm import AMAX_FLOOR, SCALE_GROUP
from .launching import Launcher, next_power_of_2
from .norm import rms_norm_rows, rotate_rows, write_rows

_rms_norm, _rotate, _write = Launcher(rms_norm_rows), Launcher(rotate_rows), Launcher(write_rows)


def rms_norm(x, weight, eps, residual):
    """See ``deepseek_v3.kernels.rms_norm``; x [M, D] with dense rows, residual contiguous."""
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    if out.numel():
        block = next_power_of_2(width)
        _rms_norm(
            (rows, 1, 1), (x, residual, weight, out, total), (width, eps, x.stride(0)),
            ADD=residual is not None, BLOCK=block, num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return out, total


def rotate(x, cos, sin, interleave):
    """See ``deepseek_v3.kernels.rotate``."""
    batch, heads, tokens, width = x.shape
    out = torch.empty(batch, tokens, heads, width, dtype=x.dtype, device=x.device)
    if out.numel():
        _rotate(
            (heads, tokens, batch), (x, cos, sin, out),
            (heads, tokens, width // 2, *x.stride()[:3], *cos.stride()[:2]),
            INTERLEAVE=interleave, HALF=next_power_of_2(width // 2), num_warps=1,
        )  # fmt: skip
    return out


def of_cache(latent, rope, scale, interleave):
    """What every launch that writes latents passes on: strides, and the constants of ``write_row``."""
    block = next_power_of_2(latent.shape[2])
    strides = (*latent.stride()[:2], *rope.stride()[:2], *((0, 0, 0) if scale is None else scale.stride()))
    constants = {
        "INTERLEAVE": interleave, "BLOCK": block, "HALF": next_power_of_2(rope.shape[2] // 2),
        "GROUP": min(SCALE_GROUP, block), "CODED": scale is not None, "num_warps": 4,
    }  # fmt: skip
    return strides, constants


def write_latents(latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale):
    """See ``deepseek_v3.kernels.write_latents``."""
    batch, tokens, _ = compressed.shape
    strides, constants = of_cache(latent, rope, scale, interleave)
    if compressed.numel():
        _write(
            (tokens, batch, 1), (compressed, weight, cos, sin, slots, latent, rope, scale),
            (latent.shape[2], rope.shape[2] // 2, eps, AMAX_FLOOR, *compressed.stride()[:2], *cos.stride()[:2],
             *slots.stride(), *strides), (latent.shape[1],),
            **constants,
        )  # fmt: skip
