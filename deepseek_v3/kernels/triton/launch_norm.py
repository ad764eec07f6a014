"""Launchers of RMSNorm, rotary embedding and the write of new latents."""

import torch
import triton

from ..reference.norm import AMAX_FLOOR, SCALE_GROUP
from .norm import rms_norm_rows, rotate_rows, write_rows


def rms_norm(x, weight, eps, residual):
    """See ``deepseek_v3.kernels.rms_norm``; x [M, D] with dense rows, residual contiguous."""
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    if out.numel():
        block = triton.next_power_of_2(width)
        rms_norm_rows[(rows,)](
            x, residual, weight, out, total, width, eps, x.stride(0), ADD=residual is not None, BLOCK=block,
            num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return out, total


def rotate(x, cos, sin, interleave):
    """See ``deepseek_v3.kernels.rotate``."""
    batch, heads, tokens, width = x.shape
    out = torch.empty(batch, tokens, heads, width, dtype=x.dtype, device=x.device)
    if out.numel():
        rotate_rows[(heads, tokens, batch)](
            x, cos, sin, out, heads, tokens, width // 2, *x.stride()[:3], *cos.stride()[:2],
            INTERLEAVE=interleave, HALF=triton.next_power_of_2(width // 2), num_warps=1,
        )  # fmt: skip
    return out


def write_latents(latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale):
    """See ``deepseek_v3.kernels.write_latents``."""
    batch, tokens, _ = compressed.shape
    rank, half = latent.shape[2], rope.shape[2] // 2
    block = triton.next_power_of_2(rank)
    if compressed.numel():
        write_rows[(tokens, batch)](
            compressed, weight, cos, sin, slots, latent, rope, scale, rank, half, latent.shape[1], eps, AMAX_FLOOR,
            *compressed.stride()[:2], *cos.stride()[:2], *slots.stride(), *latent.stride()[:2], *rope.stride()[:2],
            *((0, 0, 0) if scale is None else scale.stride()),
            INTERLEAVE=interleave, BLOCK=block, HALF=triton.next_power_of_2(half), GROUP=min(SCALE_GROUP, block),
            CODED=scale is not None, num_warps=4,
        )  # fmt: skip
