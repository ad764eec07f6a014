"""Launchers of the layout of queries, keys and values."""

import torch

from .heads import join_heads, rotate_heads, split_heads, turn_heads
from .launching import cdiv, next_power_of_2

HEADS = 16
# Of turning in place, which moves little of each.
TURNED = 32


def rotate_queries(q, cos, sin, interleave, back):
    """See ``deepseek_v3.kernels.rotate_queries``; ``back`` for its gradient."""
    batch, tokens, heads, width = q.shape
    half = cos.shape[2] // 2
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        rotate_heads[(tokens, cdiv(heads, HEADS), batch)](
            q, cos, sin, out, heads, tokens, width - 2 * half, half, *q.stride()[:3], *cos.stride()[:2],
            INTERLEAVE=interleave, BACK=back, HEADS=HEADS, NOPE=next_power_of_2(max(width - 2 * half, 1)),
            HALF=next_power_of_2(half), num_warps=4,
        )  # fmt: skip
    return out


def rotate_queries_(q, cos, sin, interleave):
    """See ``deepseek_v3.kernels.rotate_queries_``."""
    batch, tokens, heads, width = q.shape
    half = cos.shape[2] // 2
    if q.numel():
        turn_heads[(tokens, cdiv(heads, TURNED), batch)](
            q, cos, sin, heads, width - 2 * half, half, *q.stride()[:3], *cos.stride()[:2],
            INTERLEAVE=interleave, HEADS=TURNED, HALF=next_power_of_2(half), num_warps=4,
        )  # fmt: skip


def join_keys(kv, rope, nope):
    """See ``deepseek_v3.kernels.join_keys``."""
    batch, tokens, heads, width = kv.shape
    shared, value = rope.shape[2], width - nope
    k = torch.empty(batch, tokens, heads, nope + shared, dtype=kv.dtype, device=kv.device)
    v = torch.empty(batch, tokens, heads, value, dtype=kv.dtype, device=kv.device)
    if kv.numel():
        join_heads[(tokens, cdiv(heads, HEADS), batch)](
            kv, rope, k, v, heads, tokens, nope, shared, value, *kv.stride()[:3], *rope.stride()[:2],
            HEADS=HEADS, **_lanes(nope, shared, value), num_warps=4,
        )  # fmt: skip
    return k, v


def split_keys(grad_k, grad_v, nope):
    """Gradients of ``join_keys``."""
    batch, tokens, heads, width = grad_k.shape
    shared, value = width - nope, grad_v.shape[3]
    kv = torch.empty(batch, tokens, heads, nope + value, dtype=grad_k.dtype, device=grad_k.device)
    rope = torch.empty(batch, tokens, shared, dtype=grad_k.dtype, device=grad_k.device)
    if kv.numel():
        split_heads[(tokens, batch)](
            grad_k, grad_v, kv, rope, heads, tokens, nope, shared, value, *grad_k.stride()[:3], *grad_v.stride()[:3],
            HEADS=HEADS, **_lanes(nope, shared, value), num_warps=4,
        )  # fmt: skip
    return kv, rope


def _lanes(nope: int, shared: int, value: int) -> dict[str, int]:
    return {
        "NOPE": next_power_of_2(max(nope, 1)),
        "WIDTH": next_power_of_2(max(shared, 1)),
        "VALUE": next_power_of_2(max(value, 1)),
    }
