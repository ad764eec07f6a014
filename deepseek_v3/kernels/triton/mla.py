"""Kernels of the absorbed MLA decode: attention split over the cached length, then a pass that joins the splits.

B batch, T query tokens, S cached tokens, H heads, C kv_lora_rank, R qk_rope_head_dim. The T * H queries of a batch
row share every latent, so they are the rows of one matrix: a tile of rows reads a tile of the cache once for all.
With HALVES = 2 a program owns one half of the output's columns and computes the logits a second time, because a
64 x 512 float32 accumulator does not fit the registers of four warps, and eight warps would each compute all logits.

Deterministic: the split depends on shapes alone and the splits are joined in order.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def row_range(lengths, starts, b, t, queries, slots, window, LENGTHS: tl.constexpr, STARTS: tl.constexpr):
    """Slots of batch row b: its length, the first slot that any query reads, and [low, high) of each query t."""
    length = slots
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + b).to(tl.int32), slots)
    start = 0
    if STARTS:
        start = tl.maximum(tl.load(starts + b).to(tl.int32), 0)
    high = length - (queries - 1 - t)
    low = tl.maximum(start, high - window)
    return length, tl.maximum(start, length - (queries - 1) - window), low, high


@triton.jit
def softmax_step(logits, top, total):
    """New maximum and sum of base-2 logits, the weights, and the factor by which what was summed so far fades."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    # A row that has seen nothing yet keeps -inf; subtracting that from itself would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    fade = tl.exp2(top - base)
    return new_top, total * fade + tl.sum(weights, 1), weights, fade


@triton.jit
def natural(top, total):
    """Log-sum-exp in base e from a maximum and a sum in base 2; -inf where nothing was summed."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)


@triton.jit(do_not_specialize=["slots", "splits", "window"])
def mla_split(
    q_latent, q_rope, latent, rope, lengths, starts, out, lse,
    queries, heads, scale_log2,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, c_b, c_s, r_b, r_s, slots, splits, window,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, LENGTHS: tl.constexpr, STARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows over one split: out [B, T * H, splits, C] normalised, lse [B, T * H, splits]."""
    COLS: tl.constexpr = C // HALVES
    half = tl.program_id(0) % HALVES
    row = tl.program_id(0) // HALVES * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    live = row < queries * heads
    t = row // heads
    h = row % heads
    col = tl.arange(0, COLS)
    own_col = half * COLS + col
    other_col = (HALVES - 1 - half) * COLS + col
    r = tl.arange(0, R)

    ql = q_latent + b * ql_b + (t.to(tl.int64) * ql_t + h.to(tl.int64) * ql_h)[:, None]
    qr = q_rope + b * qr_b + (t.to(tl.int64) * qr_t + h.to(tl.int64) * qr_h)[:, None]
    q_own = tl.load(ql + own_col[None, :], mask=live[:, None], other=0.0)
    q_other = q_own
    if HALVES == 2:
        q_other = tl.load(ql + other_col[None, :], mask=live[:, None], other=0.0)
    q_pe = tl.load(qr + r[None, :], mask=live[:, None], other=0.0)

    # The cache is walked from the first slot that any query reads, so only the last tile can hold dead slots.
    length, first, low, high = row_range(lengths, starts, b, t, queries, slots, window, LENGTHS, STARTS)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), BLOCK_N), splits) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, COLS], tl.float32)
    if TMA:
        # The descriptors end at this row's length, so the copy engine fills what lies beyond with zeros: a mask on
        # the loads would put the tile through registers, and a tail of its own would spill them.
        latent_tiles = tl.make_tensor_descriptor(
            latent + b * c_b, [tl.maximum(length, 1), C], [c_s, 1], [BLOCK_N, COLS]
        )
        rope_tiles = tl.make_tensor_descriptor(rope + b * r_b, [tl.maximum(length, 1), R], [r_s, 1], [BLOCK_N, R])
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        slot = n + tl.arange(0, BLOCK_N)
        # Only the tile's base moves: what the addresses add to it, 32 bits wide, is computed once, before the loop. A
        # masked slot becomes zeros on its way to shared memory; it passes through no register.
        held = (slot < end)[:, None]
        latents = latent + b * c_b + tl.cast(n, tl.int64) * c_s
        keys = rope + b * r_b + tl.cast(n, tl.int64) * r_s
        line = tl.arange(0, BLOCK_N)[:, None]
        if TMA:
            own = latent_tiles.load([n, half * COLS])
            pe = rope_tiles.load([n, 0])
        else:
            own = tl.load(latents + (line * c_s + own_col[None, :]), mask=held, other=0.0)
            pe = tl.load(keys + (line * r_s + r[None, :]), mask=held, other=0.0)
        other = own
        if HALVES == 2:
            if TMA:
                other = latent_tiles.load([n, (1 - half) * COLS])
            else:
                other = tl.load(latents + (line * c_s + other_col[None, :]), mask=held, other=0.0)
        logits = tl.dot(q_own, own.T)
        if HALVES == 2:
            logits = tl.dot(q_other, other.T, logits)
        logits = tl.dot(q_pe, pe.T, logits)
        seen = (slot[None, :] < high[:, None]) & (slot[None, :] >= low[:, None])
        logits = tl.where(seen, logits * scale_log2, float("-inf"))
        top, total, weights, fade = softmax_step(logits, top, total)
        acc = tl.dot(weights.to(own.dtype), own, acc * fade[:, None])

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (b * queries * heads + row) * splits + split
    tl.store(out + place[:, None] * C + own_col[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse + place, natural(top, total), mask=live & (half == 0))


@triton.jit(do_not_specialize=["splits"])
def mla_combine(
    partial, partial_lse, out, lse, splits,
    C: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Join the splits of one query row: partial [rows, splits, C] float32 -> out [rows, C], lse [rows].

    EARLY: launched while the kernel before it still runs, on which it waits here.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    split = tl.arange(0, SPLITS)
    if EARLY:
        gdc_wait()
    each = tl.load(partial_lse + row * splits + split, mask=split < splits, other=float("-inf"))
    values = tl.load(
        partial + (row * splits + split[:, None]) * C + col[None, :], mask=(split < splits)[:, None], other=0.0
    )
    top = tl.max(each, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(each - base)
    total = tl.sum(weight, 0)
    mixed = tl.sum(values * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * C + col, mixed.to(out.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), base + tl.log(total)))
