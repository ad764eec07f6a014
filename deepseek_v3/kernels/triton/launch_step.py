"""Launchers of the joined steps of a decode layer."""

import torch

from ..reference.norm import AMAX_FLOOR
from .launch_norm import of_cache
from .launching import Launcher, cdiv, next_power_of_2
from .step import angle_rows, head_products, norm_and_write_rows

_angles, _products, _norm_and_write = Launcher(angle_rows), Launcher(head_products), Launcher(norm_and_write_rows)


def rope_angles(positions, frequencies, factor, dtype):
    """See ``deepseek_v3.kernels.rope_angles``."""
    batch, tokens = positions.shape
    half = frequencies.shape[0]
    cos = torch.empty(batch, tokens, 2 * half, dtype=dtype, device=positions.device)
    sin = torch.empty_like(cos)
    if cos.numel():
        _angles(
            (tokens, batch, 1), (positions, frequencies, cos, sin), (tokens, half, factor, *positions.stride()),
            HALF=next_power_of_2(half), num_warps=1,
        )  # fmt: skip
    return cos, sin


def norm_and_write(
    low, low_weight, low_eps, latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale
):
    """See ``deepseek_v3.kernels.norm_and_write``."""
    batch, tokens, width = low.shape
    strides, constants = of_cache(latent, rope, scale, interleave)
    out = torch.empty(low.shape, dtype=low.dtype, device=low.device)
    if out.numel():
        _norm_and_write(
            (tokens, batch, 2), (low, low_weight, out, compressed, weight, cos, sin, slots, latent, rope, scale),
            (width, low_eps, *low.stride()[:2], latent.shape[2], rope.shape[2] // 2, eps, AMAX_FLOOR,
             *compressed.stride()[:2], *cos.stride()[:2], *slots.stride(), *strides), (latent.shape[1],),
            LOW=next_power_of_2(width), **constants,
        )  # fmt: skip
    return out


def _head_products(x, w, out, depth, angles, turned, interleave, w_k, w_n):
    """Fill ``out`` [B, T, H, columns] from the first ``depth`` numbers of x [B, T, H, .] and w [H, ., .]."""
    batch, tokens, heads, columns = out.shape
    rows, half = batch * tokens, 0 if turned is None else turned.shape[3] // 2
    block_m = min(64, max(16, next_power_of_2(rows)))
    block_n, block_k = (128, 128) if w_n == 1 else (32, 128)
    block_n, block_k = min(block_n, _power(columns)), min(block_k, _power(depth))
    cos, sin = (None, None) if angles is None else angles
    _products(
        (heads, cdiv(columns, block_n), cdiv(rows, block_m)), (x, w, out, cos, sin, turned),
        (rows, tokens, heads, depth, columns, half, *x.stride()[:3], w.stride(0), w_k, w_n,
         *((0, 0) if cos is None else cos.stride()[:2])),
        ROTATE=turned is not None, INTERLEAVE=interleave, HALF=next_power_of_2(max(half, 1)),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=2,
    )  # fmt: skip


def _power(size: int) -> int:
    return max(16, next_power_of_2(size))


def absorb_queries(q, weight, cos, sin, interleave):
    """See ``deepseek_v3.kernels.absorb_queries``."""
    batch, tokens, heads, width = q.shape
    rank, turning = weight.shape[1], cos.shape[2]
    latent = torch.empty(batch, tokens, heads, rank, dtype=q.dtype, device=q.device)
    turned = torch.empty(batch, tokens, heads, turning, dtype=q.dtype, device=q.device)
    if latent.numel():
        w = weight.view(heads, -1, rank)
        _head_products(q, w, latent, width - turning, (cos, sin), turned, interleave, w.stride(1), w.stride(2))
    return latent, turned


def absorb_outputs(mixed, weight, value):
    """See ``deepseek_v3.kernels.absorb_outputs``."""
    batch, tokens, heads, rank = mixed.shape
    out = torch.empty(batch, tokens, heads, value, dtype=mixed.dtype, device=mixed.device)
    if out.numel():
        w = weight.view(heads, -1, rank)[:, -value:]
        _head_products(mixed, w, out, rank, None, None, False, w.stride(2), w.stride(1))
    return out
