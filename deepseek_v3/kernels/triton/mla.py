"""Kernels of the absorbed MLA decode: attention split over the cached length, then a pass that joins the splits.

B batch, T query tokens, S cached tokens, H heads, C kv_lora_rank, R qk_rope_head_dim. The T * H queries of a batch
row share every latent, so they are the rows of one matrix: a tile of rows reads a tile of the cache once for all.
With HALVES = 2 a program owns one half of the output's columns and computes the logits a second time, because a
64 x 512 float32 accumulator does not fit the registers of four warps, and eight warps would each compute all logits.

Deterministic: the split depends on shapes alone and the splits are joined in order.
"""

import triton
import triton.language as tl


@triton.jit
def _read(
    codes, scales, col, alive, DTYPE: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """A [ROWS, COLS] tile of latents through pointers; FP8 codes are multiplied with their scales, one for 128."""
    tile = tl.load(codes + col[None, :], mask=alive, other=0.0)
    if FP8:
        scale = tl.load(scales + tl.arange(0, COLS // 128)[None, :], mask=alive, other=0.0)
        wide = tl.reshape(tile.to(tl.float32), (ROWS, COLS // 128, 128)) * scale[:, :, None]
        tile = tl.reshape(wide, (ROWS, COLS)).to(DTYPE)
    return tile


@triton.jit
def _attend(q_own, q_other, q_pe, own, other, pe, seen, scale_log2, top, total, acc, HALVES: tl.constexpr):
    """One online-softmax step over a tile of the cache; logits are kept in base 2."""
    logits = tl.dot(q_own, own.T)
    if HALVES == 2:
        logits = tl.dot(q_other, other.T, logits)
    logits = tl.dot(q_pe, pe.T, logits)
    logits = tl.where(seen, logits * scale_log2, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    # A row that has seen nothing yet keeps -inf; subtracting that from itself would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(own.dtype), own, acc * fade[:, None])
    return new_top, total, acc


@triton.jit(do_not_specialize=["splits", "window"])
def mla_split(
    q_latent, q_rope, latent, rope, latent_scale, lengths, starts, out, lse,
    queries, heads, slots, splits, window, scale_log2,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, c_b, c_s, r_b, r_s, s_b, s_s,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FP8: tl.constexpr, TMA: tl.constexpr, LENGTHS: tl.constexpr, STARTS: tl.constexpr, STAGES: tl.constexpr,
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
    dtype: tl.constexpr = q_latent.dtype.element_ty

    ql = q_latent + b * ql_b + (t.to(tl.int64) * ql_t + h.to(tl.int64) * ql_h)[:, None]
    qr = q_rope + b * qr_b + (t.to(tl.int64) * qr_t + h.to(tl.int64) * qr_h)[:, None]
    q_own = tl.load(ql + own_col[None, :], mask=live[:, None], other=0.0)
    q_other = q_own
    if HALVES == 2:
        q_other = tl.load(ql + other_col[None, :], mask=live[:, None], other=0.0)
    q_pe = tl.load(qr + r[None, :], mask=live[:, None], other=0.0)

    length = slots
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + b).to(tl.int32), slots)
    start = 0
    if STARTS:
        start = tl.maximum(tl.load(starts + b).to(tl.int32), 0)
    high = length - (queries - 1 - t)
    low = tl.maximum(start, high - window)
    # The cache is walked from the first slot that any query reads, so only the last tile can hold dead slots.
    first = tl.maximum(start, length - (queries - 1) - window)
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
        if TMA:
            own = latent_tiles.load([n, half * COLS])
            other = own
            if HALVES == 2:
                other = latent_tiles.load([n, (1 - half) * COLS])
            pe = rope_tiles.load([n, 0])
        else:
            alive = (slot < end)[:, None]
            place = slot.to(tl.int64)[:, None]
            codes = latent + b * c_b + place * c_s
            scales = latent_scale
            if FP8:
                scales = latent_scale + b * s_b + place * s_s + half * (COLS // 128)
            own = _read(codes, scales, own_col, alive, dtype, FP8, BLOCK_N, COLS)
            other = own
            if HALVES == 2:
                if FP8:
                    scales += (1 - 2 * half) * (COLS // 128)
                other = _read(codes, scales, other_col, alive, dtype, FP8, BLOCK_N, COLS)
            pe = tl.load(rope + b * r_b + place * r_s + r[None, :], mask=alive, other=0.0).to(dtype)
        seen = (slot[None, :] < high[:, None]) & (slot[None, :] >= low[:, None])
        top, total, acc = _attend(q_own, q_other, q_pe, own, other, pe, seen, scale_log2, top, total, acc, HALVES)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    place = (b * queries * heads + row) * splits + split
    tl.store(out + place[:, None] * C + own_col[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])
    # 0.6931... is ln 2: the log-sum-exp is handed on in base e.
    value = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    tl.store(lse + place, value, mask=live & (half == 0))


@triton.jit(do_not_specialize=["splits"])
def mla_combine(partial, partial_lse, out, lse, splits, C: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr):
    """Join the splits of one query row: partial [rows, splits, C] float32 -> out [rows, C], lse [rows]."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    split = tl.arange(0, SPLITS)
    each = tl.load(partial_lse + row * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(each, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(each - base)
    total = tl.sum(weight, 0)
    values = tl.load(
        partial + (row * splits + split[:, None]) * C + col[None, :], mask=(split < splits)[:, None], other=0.0
    )
    mixed = tl.sum(values * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * C + col, mixed.to(out.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), base + tl.log(total)))
