"""Kernels of the joined steps of a decode layer. Deterministic: each number is summed by one program in one order."""

import triton
import triton.language as tl

from .norm import normalised, write_row


@triton.jit
def angle_rows(positions, frequencies, cos, sin, tokens, half, factor, p_b, p_t, HALF: tl.constexpr):
    """cos and sin [B, T, 2 half] of one token's angles, each half the same."""
    t = tl.program_id(0)
    b = tl.program_id(1)
    lane = tl.arange(0, HALF)
    mask = lane < half
    position = tl.load(positions + b.to(tl.int64) * p_b + t.to(tl.int64) * p_t).to(tl.float32)
    angle = position * tl.load(frequencies + lane, mask=mask, other=0.0).to(tl.float32)
    c = (tl.cos(angle) * factor).to(cos.dtype.element_ty)
    s = (tl.sin(angle) * factor).to(sin.dtype.element_ty)
    place = (b.to(tl.int64) * tokens + t) * 2 * half + lane
    tl.store(cos + place, c, mask=mask)
    tl.store(cos + place + half, c, mask=mask)
    tl.store(sin + place, s, mask=mask)
    tl.store(sin + place + half, s, mask=mask)


@triton.jit(do_not_specialize=["capacity"])
def norm_and_write_rows(
    low, low_weight, out, compressed, weight, cos, sin, slots, latent, rope, scale,
    low_width, low_eps, l_b, l_t, rank, half, eps, floor,
    x_b, x_t, cos_b, cos_t, slot_b, slot_t, c_b, c_s, r_b, r_s, s_b, s_s, s_g, capacity,
    LOW: tl.constexpr, INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    """One token: its query's low rank normalised to out [B, T, low_width], or its latent and key into the cache."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = compressed.dtype.element_ty
    if tl.program_id(2) == 0:
        lane = tl.arange(0, LOW)
        inner = lane < low_width
        short = tl.load(low + b * l_b + t * l_t + lane, mask=inner, other=0.0).to(tl.float32)
        w = tl.load(low_weight + lane, mask=inner, other=0.0)
        target = out + (b * tl.num_programs(0) + t) * low_width + lane
        tl.store(target, normalised(short, w, low_width, low_eps, dtype), mask=inner)
    else:
        write_row(
            compressed + b * x_b + t * x_t, weight, cos, sin, tl.load(slots + b * slot_b + t * slot_t).to(tl.int64),
            latent + b * c_b, rope + b * r_b, scale + b * s_b if CODED else None, rank, half, capacity, eps, floor,
            b * cos_b + t * cos_t, c_s, r_s, s_s, s_g, INTERLEAVE, BLOCK, HALF, GROUP, CODED,
        )  # fmt: skip


@triton.jit
def _turn(
    q, cos, sin, out, row, live, tokens, half, q_b, q_t, cos_b, cos_t, INTERLEAVE: tl.constexpr, HALF: tl.constexpr
):
    """Rotated pairs at q of the tokens `row`, to out [.., 2 half] at each row."""
    lane = tl.arange(0, HALF)[None, :]
    b = (row // tokens).to(tl.int64)[:, None]
    t = (row % tokens).to(tl.int64)[:, None]
    mask = live[:, None] & (lane < half)
    at = q + b * q_b + t * q_t
    first = tl.load(at + lane * (2 if INTERLEAVE else 1), mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + (lane * 2 + 1 if INTERLEAVE else lane + half), mask=mask, other=0.0).to(tl.float32)
    place = b * cos_b + t * cos_t + lane
    c = tl.load(cos + place, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + place, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + lane, (first * c - second * s).to(dtype), mask=mask)
    tl.store(out + half + lane, (second * c + first * s).to(dtype), mask=mask)


@triton.jit
def head_products(
    x, w, out, cos, sin, turned_out, rows, tokens, heads, depth, columns, half,
    x_b, x_t, x_h, w_h, w_k, w_n, cos_b, cos_t,
    ROTATE: tl.constexpr, INTERLEAVE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row, h] = x[row, h, :depth] @ w[h], columns wide; ROTATE: what follows in x, turned, to turned_out.

    A row is a token of a batch row; x is [B, T, H, .] with strides, both results [B, T, H, .] dense.
    """
    h = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    at = (row // tokens).to(tl.int64) * x_b + (row % tokens).to(tl.int64) * x_t + h * x_h
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(x + at[:, None] + k[None, :], mask=live[:, None] & (k < depth)[None, :], other=0.0)
        place = w + h * w_h + k.to(tl.int64)[:, None] * w_k + n.to(tl.int64)[None, :] * w_n
        b = tl.load(place, mask=(k < depth)[:, None] & (n < columns)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    place = row.to(tl.int64) * heads + h
    target = out + place[:, None] * columns + n[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=live[:, None] & (n < columns)[None, :])
    if ROTATE:
        if tl.program_id(1) == 0:
            _turn(x + h * x_h + depth, cos, sin, turned_out + place[:, None] * 2 * half, row, live, tokens, half,
                  x_b, x_t, cos_b, cos_t, INTERLEAVE, HALF)  # fmt: skip
