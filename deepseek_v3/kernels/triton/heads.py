"""Kernels that lay out queries, keys and values for expanded attention; a program takes some heads of one token.

Deterministic: the gradient of the shared key part is summed over the heads by one program, in order.
"""

import triton
import triton.language as tl


@triton.jit
def move(source, target, mask):
    """Copy lanes, to the target's dtype."""
    tl.store(target, tl.load(source, mask=mask, other=0.0).to(target.dtype.element_ty), mask=mask)


@triton.jit
def rotate_heads(
    q, cos, sin, out, heads, tokens, nope, half, q_b, q_t, q_h, cos_b, cos_t,
    INTERLEAVE: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token of out [B, T, H, nope + 2 half]. BACK: the gradient, which turns the other way."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = (h < heads)[:, None]
    source = q + b * q_b + t * q_t + h.to(tl.int64)[:, None] * q_h
    target = out + ((b * tokens + t) * heads + h)[:, None] * (nope + 2 * half)
    col = tl.arange(0, NOPE)[None, :]
    move(source + col, target + col, live & (col < nope))
    lane = tl.arange(0, HALF)
    place = b * cos_b + t * cos_t + lane
    c = tl.load(cos + place, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + place, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    mask = live & (lane < half)[None, :]
    front = nope + lane[None, :]
    # Pairs that are neighbours, before the rotation, are read and written whole.
    whole = nope + tl.arange(0, 2 * HALF)[None, :]
    mask_whole = live & (whole < nope + 2 * half)
    if INTERLEAVE and not BACK:
        pairs = tl.load(source + whole, mask=mask_whole, other=0.0).to(tl.float32)
        first, second = tl.split(pairs.reshape(HEADS, HALF, 2))
    else:
        first = tl.load(source + front, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + front + half, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        first, second = first * c + second * s, second * c - first * s
    else:
        first, second = first * c - second * s, second * c + first * s
    dtype: tl.constexpr = out.dtype.element_ty
    if INTERLEAVE and BACK:
        pairs = tl.join(first, second).to(dtype).reshape(HEADS, 2 * HALF)
        tl.store(target + whole, pairs, mask=mask_whole)
    else:
        tl.store(target + front, first.to(dtype), mask=mask)
        tl.store(target + front + half, second.to(dtype), mask=mask)


@triton.jit
def turn_heads(
    q, cos, sin, heads, nope, half, q_b, q_t, q_h, cos_b, cos_t,
    INTERLEAVE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """As `rotate_heads`, in place: of HEADS heads of one token the last 2 half numbers."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, HALF)
    place = b * cos_b + t * cos_t + lane
    c = tl.load(cos + place, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + place, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    live = (h < heads)[:, None]
    mask = live & (lane < half)[None, :]
    own = q + b * q_b + t * q_t + h.to(tl.int64)[:, None] * q_h + nope
    if INTERLEAVE:
        # Neighbours are read together, in long pieces.
        both = tl.arange(0, 2 * HALF)[None, :]
        pairs = tl.load(own + both, mask=live & (both < 2 * half), other=0.0).to(tl.float32)
        first, second = tl.split(pairs.reshape(HEADS, HALF, 2))
    else:
        first = tl.load(own + lane[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(own + half + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    # One thread's places are read by another: all are read before any is written.
    tl.debug_barrier()
    dtype: tl.constexpr = q.dtype.element_ty
    tl.store(own + lane[None, :], (first * c - second * s).to(dtype), mask=mask)
    tl.store(own + half + lane[None, :], (second * c + first * s).to(dtype), mask=mask)


@triton.jit
def join_heads(
    kv, rope, k, v, heads, tokens, nope, width, value, kv_b, kv_t, kv_h, rope_b, rope_t,
    HEADS: tl.constexpr, NOPE: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: k [B, S, H, nope + width] and v [B, S, H, value]; width is the shared part's."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = (h < heads)[:, None]
    source = kv + b * kv_b + t * kv_t + h.to(tl.int64)[:, None] * kv_h
    row = ((b * tokens + t) * heads + h)[:, None]
    target = k + row * (nope + width)
    col = tl.arange(0, NOPE)[None, :]
    move(source + col, target + col, live & (col < nope))
    lane = tl.arange(0, WIDTH)
    shared = tl.load(rope + b * rope_b + t * rope_t + lane, mask=lane < width, other=0.0)
    tl.store(target + nope + lane[None, :], shared[None, :] + tl.zeros([HEADS, WIDTH], k.dtype.element_ty),
             mask=live & (lane < width)[None, :])  # fmt: skip
    col = tl.arange(0, VALUE)[None, :]
    move(source + nope + col, v + row * value + col, live & (col < value))


@triton.jit
def split_heads(
    grad_k, grad_v, kv, rope, heads, tokens, nope, width, value, k_b, k_t, k_h, v_b, v_t, v_h,
    HEADS: tl.constexpr, NOPE: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """All heads of one token: gradients kv [B, S, H, nope + value], and rope [B, S, width] summed over the heads."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, heads, HEADS):
        h = start + tl.arange(0, HEADS)
        live = (h < heads)[:, None]
        of_k = grad_k + b * k_b + t * k_t + h.to(tl.int64)[:, None] * k_h
        of_v = grad_v + b * v_b + t * v_t + h.to(tl.int64)[:, None] * v_h
        target = kv + ((b * tokens + t) * heads + h)[:, None] * (nope + value)
        col = tl.arange(0, NOPE)[None, :]
        move(of_k + col, target + col, live & (col < nope))
        col = tl.arange(0, VALUE)[None, :]
        move(of_v + col, target + nope + col, live & (col < value))
        part = tl.load(of_k + nope + lane[None, :], mask=live & (lane < width)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(rope + (b * tokens + t) * width + lane, total.to(rope.dtype.element_ty), mask=lane < width)
