"""Kernels of the absorbed MLA decode over FP8 latents.

Many query rows are bound by arithmetic: for them the latents are widened once, in a pass before. Few rows are bound
by reading, and widen what they read:

E4M3 codes are exact in float16, and so, to 11 bits, are they times the ratio of their group's scale to the largest
scale of their token, which is at most 1: that is what the products take. The token's largest scale multiplies its
logits and its softmax weight. Float16 has little range, so queries are taken relative to a power of two of their row,
and weights relative to the largest scale seen so far, which fades the accumulator just as a new maximum does.

The next tile's codes are loaded into registers while this one is worked on: they have to pass through registers to
be widened, and the compiler prefetches only what goes from memory to shared memory unchanged.

Deterministic: the split depends on shapes alone and the splits are joined in order.
"""

import triton
import triton.language as tl

from .mla import natural, row_range, softmax_step


@triton.jit
def power_above(x):
    """The power of two at or above each positive float32; 1 for zero."""
    bits = (x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return tl.where(x > 0, bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _fetch(codes, rope, scales, n, end, c_s, r_s, s_s, s_g, C: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Codes, roped keys and scales of BLOCK_N slots from n; past the end the last live slot again, not a dead one."""
    place = tl.minimum(tl.cast(n, tl.int64) + tl.arange(0, BLOCK_N), end - 1)[:, None]
    tile = tl.load(codes + place * c_s + tl.arange(0, C)[None, :])
    pe = tl.load(rope + place * r_s + tl.arange(0, R)[None, :])
    scale = tl.load(scales + place * s_s + tl.arange(0, C // 128).to(tl.int64)[None, :] * s_g)
    return tile, pe, scale


@triton.jit(do_not_specialize=["slots", "splits", "window"])
def mla_split_fp8(
    q_latent, q_rope, latent, rope, latent_scale, lengths, starts, out, lse,
    queries, heads, scale_log2,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, c_b, c_s, r_b, r_s, s_b, s_s, s_g, slots, splits, window,
    C: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LENGTHS: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """As ``mla_split``, over codes [B, S, C] and latent_scale [B, S, C / 128]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    live = row < queries * heads
    t = row // heads
    h = row % heads
    col = tl.arange(0, C)
    ql = q_latent + b * ql_b + (t.to(tl.int64) * ql_t + h.to(tl.int64) * ql_h)[:, None]
    qr = q_rope + b * qr_b + (t.to(tl.int64) * qr_t + h.to(tl.int64) * qr_h)[:, None]
    q = tl.load(ql + col[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    q_pe = tl.load(qr + tl.arange(0, R)[None, :], mask=live[:, None], other=0.0)
    unit = power_above(tl.max(tl.abs(q), 1))
    q = (q / unit[:, None]).to(tl.float16)

    length, first, low, high = row_range(lengths, starts, b, t, queries, slots, window, LENGTHS, STARTS)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), BLOCK_N), splits) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, C], tl.float32)
    largest = tl.full([], 0.0, tl.float32)
    if begin < end:
        codes = latent + b * c_b
        keys = rope + b * r_b
        scales = latent_scale + b * s_b
        tile, pe, scale = _fetch(codes, keys, scales, begin, end, c_s, r_s, s_s, s_g, C, R, BLOCK_N)
        for n in tl.range(begin, end, BLOCK_N, num_stages=1):
            after = _fetch(codes, keys, scales, n + BLOCK_N, end, c_s, r_s, s_s, s_g, C, R, BLOCK_N)
            size = tl.max(scale, 1)
            ratio = (scale / size[:, None]).to(tl.float16)
            wide = tl.reshape(tile.to(tl.float16), (BLOCK_N, C // 128, 128)) * ratio[:, :, None]
            values = tl.reshape(wide, (BLOCK_N, C))
            logits = tl.dot(q, values.T) * (unit[:, None] * size[None, :])
            logits = tl.dot(q_pe, pe.to(q_pe.dtype).T, logits)
            slot = n + tl.arange(0, BLOCK_N)
            seen = (slot[None, :] < high[:, None]) & (slot[None, :] >= low[:, None])
            logits = tl.where(seen, logits * scale_log2, float("-inf"))
            top, total, weights, fade = softmax_step(logits, top, total)
            new_largest = tl.maximum(largest, power_above(tl.max(size, 0)))
            weights = weights * (size / new_largest)[None, :]
            acc = tl.dot(weights.to(tl.float16), values, acc * (fade * (largest / new_largest))[:, None])
            largest = new_largest
            tile, pe, scale = after

    acc = acc * largest / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (b * queries * heads + row) * splits + split
    tl.store(out + place[:, None] * C + col[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse + place, natural(top, total), mask=live)


@triton.jit
def widen_latents(
    codes, scale, out, lengths, starts, slots, c_b, c_s, s_b, s_s, s_g,
    C: tl.constexpr, ROWS: tl.constexpr, LENGTHS: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """out [B, S, C] = codes * scale, in the slots in use."""
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    length, start, _, _ = row_range(lengths, starts, b, 0, 1, slots, slots, LENGTHS, STARTS)
    slot = first + tl.arange(0, ROWS)
    live = ((slot < length) & (slot >= start))[:, None]
    place = slot.to(tl.int64)[:, None]
    col = tl.arange(0, C)[None, :]
    tile = tl.load(codes + b * c_b + place * c_s + col, mask=live, other=0.0).to(tl.float32)
    group = tl.arange(0, C // 128).to(tl.int64)[None, :]
    size = tl.load(scale + b * s_b + place * s_s + group * s_g, mask=live, other=0.0)
    wide = tl.reshape(tl.reshape(tile, (ROWS, C // 128, 128)) * size[:, :, None], (ROWS, C))
    tl.store(out + (b * slots + place) * C + col, wide.to(out.dtype.element_ty), mask=live)
