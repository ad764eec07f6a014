"""Kernel of the absorbed MLA decode for many query rows on Hopper, in Gluon: warps of three kinds side by side.

A program has 64 rows. One warp feeds tiles of 64 cached tokens into two buffers through the copy engine. Two
warpgroups take turns: the first computes the logits and weights of the even tiles, the second those of the odd ones,
and each adds every tile's part to its own half of the 512 output columns. While one works out weights, the tensor
cores serve the other. Weights cross over through shared memory, in the place of the tile's roped keys, which nobody
needs any more. A half of a buffer is refilled as soon as its last reader is through with it.

The running maximum passes from tile to tile, so both warpgroups fade what they have summed by the same factors. Each
announces a tile's maximum before its weights, for the other to fade meanwhile.

Deterministic: the split depends on shapes alone and the splits are joined in order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

# Steps of a split at least: those of its tilings, so that a cache with room to spare is split as one without.
LEAST = gl.constexpr(2)
# No split is so long.
NEVER = gl.constexpr(1 << 30)


@gluon.jit
def share_of(
    lengths, starts, b, t, split, queries, slots, splits, window,
    STEP: gl.constexpr, LONG: gl.constexpr, LENGTHS: gl.constexpr, STARTS: gl.constexpr,
):  # fmt: skip
    """Batch row b's length, the first slot and the steps of STEP slots of one split, and [low, high) of each query.

    LONG: steps above which a split has twice as many at least.
    """
    length = slots
    if LENGTHS:
        length = gl.minimum(gl.load(lengths + b).to(gl.int32), slots)
    start = 0
    if STARTS:
        start = gl.maximum(gl.load(starts + b).to(gl.int32), 0)
    high = length - (queries - 1 - t)
    low = gl.maximum(start, high - window)
    first = gl.maximum(start, length - (queries - 1) - window)
    steps = (gl.maximum(length - first, 0) + STEP - 1) // STEP
    share = gl.maximum((steps + splits - 1) // splits, gl.where(steps > LONG, 2 * LEAST, LEAST)) * STEP
    begin = first + split * share
    return length, begin, (gl.minimum(begin + share, length) - begin + STEP - 1) // STEP, low, high


@gluon.jit
def _feed(
    latent, rope, lengths, starts, values, keys, full, free, queries, c_b, c_s, r_b, r_s, slots, splits, window,
    C: gl.constexpr, R: gl.constexpr, LENGTHS: gl.constexpr, STARTS: gl.constexpr,
):  # fmt: skip
    """The copying warp. Half h of buffer ``turn`` is free when warpgroup h is through with it; the roped keys, and
    the weights that take their place, when the warpgroup is that did not compute the weights."""
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    b = gl.program_id(2).to(gl.int64)
    length, begin, pairs, low, high = share_of(
        lengths, starts, b, 0, gl.program_id(1), queries, slots, splits, window, 128, NEVER, LENGTHS, STARTS
    )
    # Descriptors that end at this row's length: the copy engine fills what lies beyond with zeros.
    room = gl.maximum(length, 1)
    latent_tiles = tma.make_tensor_descriptor(latent + b * c_b, [room, C], [c_s, 1], [64, C // 2], shared)
    rope_tiles = tma.make_tensor_descriptor(rope + b * r_b, [room, R], [r_s, 1], [64, R], shared)
    for pair in range(gl.maximum(pairs, 1)):
        for turn in gl.static_range(2):
            slot = begin + pair * 128 + turn * 64
            for other in gl.static_range(2):
                h = turn ^ other
                bar = full.index(turn * 2 + h)
                mbarrier.wait(free.index(turn * 2 + h), (pair & 1) ^ 1)
                mbarrier.expect(bar, 64 * C + other * 64 * R * 2)
                tma.async_copy_global_to_shared(latent_tiles, [slot, h * (C // 2)], bar, values.index(turn * 2 + h))
                if other == 1:
                    tma.async_copy_global_to_shared(rope_tiles, [slot, 0], bar, keys.index(turn))


@gluon.jit
def _load_rows(q, q_s, first_row, queries, heads, q_t, q_h, COLS: gl.constexpr):
    """64 rows of queries into shared memory; zeros beyond the last."""
    LANES: gl.constexpr = COLS // 8 if COLS < 256 else 32
    linear: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, linear))
    at = (row // heads).to(gl.int64) * q_t + (row % heads).to(gl.int64) * q_h
    col = gl.arange(0, COLS, gl.SliceLayout(0, linear))
    q_s.store(gl.load(q + at[:, None] + col[None, :], mask=(row < queries * heads)[:, None], other=0.0))


@gluon.jit
def _logits(q_s, pe_s, values, keys, full, phase, zero, W: gl.constexpr, logit: gl.constexpr):
    """Logits [64, 64] of the tile in buffer W. ``zero`` is 0, which the compiler cannot know: it would keep the
    addresses of all operands in registers, of which there are too few."""
    logits = gl.zeros([64, 64], gl.float32, logit)
    mbarrier.wait(full.index(W * 3), phase)
    own = values.index(W * 3 + zero).permute((1, 0))
    logits = warpgroup_mma(q_s.index(W + zero), own, logits, use_acc=False, is_async=True)
    mbarrier.wait(full.index(W + 1), phase)
    other = values.index(W + 1 + zero).permute((1, 0))
    logits = warpgroup_mma(q_s.index(1 - W + zero), other, logits, is_async=True)
    logits = warpgroup_mma(pe_s.index(zero), keys.index(W + zero).permute((1, 0)), logits, is_async=True)
    return warpgroup_mma_wait(0, deps=[logits])


@gluon.jit
def _weigh(
    logits, keys, tops, topped, weighed, top, total, slot, low, high, least, most, scale_log2,
    W: gl.constexpr, logit: gl.constexpr,
):  # fmt: skip
    """Weights of the tile in buffer W, also for the other warpgroup; the new maximum and sum, and the past's factor.

    least, most: a tile between them every query sees, so that it takes no masks.
    """
    if (slot < least) | (slot + 64 > most):
        at = slot + gl.arange(0, 64, gl.SliceLayout(0, logit))
        logits = gl.where((at[None, :] < high[:, None]) & (at[None, :] >= low[:, None]), logits, float("-inf"))
    new_top = gl.maximum(top, gl.max(logits, 1) * scale_log2)
    # A row that has seen nothing yet keeps -inf; subtracting that from itself would be NaN.
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    tops.index(W).store(new_top)
    mbarrier.arrive(topped.index(W), count=1)
    weights = gl.exp2(logits * scale_log2 - base[:, None])
    fade = gl.exp2(top - base)
    rounded = weights.to(keys.dtype)
    keys.index(W).store(rounded)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(weighed.index(W), count=1)
    return new_top, total * fade + gl.sum(weights, 1), rounded, fade


@gluon.jit
def _own(rounded, fade, values, free, acc, W: gl.constexpr, output: gl.constexpr):
    """Adds the part of this warpgroup's own tile, with the weights from its registers."""
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, output))[:, None]
    rounded = gl.convert_layout(rounded, gl.DotOperandLayout(0, output, 2))
    acc = warpgroup_mma(rounded, values.index(W * 3), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(W * 3), count=1)
    return acc


@gluon.jit
def _other(
    values, keys, tops, topped, weighed, top, total, acc, phase,
    W: gl.constexpr, logit: gl.constexpr, output: gl.constexpr,
):  # fmt: skip
    """Adds the part of the other warpgroup's tile, not waited for; the maximum with it, and the faded sum."""
    mbarrier.wait(topped.index(1 - W), phase)
    new_top = tops.index(1 - W).load(gl.SliceLayout(1, logit))
    fade = gl.exp2(top - gl.where(new_top == float("-inf"), 0.0, new_top))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, output))[:, None]
    mbarrier.wait(weighed.index(1 - W), phase)
    acc = warpgroup_mma(keys.index(1 - W), values.index(2 - W), acc, is_async=True)
    return new_top, total * fade, acc


@gluon.jit
def _finish(
    out, lse, totals, done, top, total, acc, b, split, first_row, queries, heads, splits,
    W: gl.constexpr, C: gl.constexpr, logit: gl.constexpr, output: gl.constexpr,
):  # fmt: skip
    """Stores this warpgroup's half of the output, over the sum of both warpgroups' weights."""
    totals.index(W).store(total)
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)
    total = totals.index(0).load(gl.SliceLayout(1, logit)) + totals.index(1).load(gl.SliceLayout(1, logit))
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    if W == 0:
        row = first_row + gl.arange(0, 64, gl.SliceLayout(1, logit))
        # 0.6931... is ln 2: the log-sum-exp is handed on in base e.
        value = gl.where(empty, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
        gl.store(lse + (b * queries * heads + row) * splits + split, value, mask=row < queries * heads)
    share = gl.convert_layout(gl.where(empty, 0.0, 1.0 / total), gl.SliceLayout(1, output))
    # Where a row has seen nothing, what its weights of zero met may have been NaN.
    acc = gl.where((share == 0.0)[:, None], 0.0, acc * share[:, None])
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, output))
    col = W * (C // 2) + gl.arange(0, C // 2, gl.SliceLayout(0, output))
    place = (b * queries * heads + row) * splits + split
    gl.store(
        out + place[:, None] * C + col[None, :], acc.to(out.dtype.element_ty), mask=(row < queries * heads)[:, None]
    )


@gluon.jit
def _attend(
    q_latent, q_rope, lengths, starts, out, lse, q_s, pe_s, values, keys, tops, totals,
    full, free, topped, weighed, loaded, done, queries, heads, scale_log2, ql_b, ql_t, ql_h, qr_b, qr_t, qr_h,
    slots, splits, window,
    W: gl.constexpr, C: gl.constexpr, R: gl.constexpr, LENGTHS: gl.constexpr, STARTS: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: logits and weights of the tiles in buffer W, and its half of the output's columns."""
    logit: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C // 2, 16])
    split = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    first_row = gl.program_id(0) * 64
    _load_rows(q_latent + b * ql_b + W * (C // 2), q_s.index(W), first_row, queries, heads, ql_t, ql_h, C // 2)
    if W == 1:
        _load_rows(q_rope + b * qr_b, pe_s.index(0), first_row, queries, heads, qr_t, qr_h, R)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(loaded, count=1)
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, logit))
    length, begin, pairs, low, high = share_of(
        lengths, starts, b, row // heads, split, queries, slots, splits, window, 128, NEVER, LENGTHS, STARTS
    )
    length, begin, pairs, least, high_last = share_of(
        lengths, starts, b, queries - 1, split, queries, slots, splits, window, 128, NEVER, LENGTHS, STARTS
    )
    most = length - (queries - 1)
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, logit))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, logit))
    acc = gl.zeros([64, C // 2], gl.float32, output)
    mbarrier.wait(loaded, 0)
    for pair in range(gl.maximum(pairs, 1)):
        phase = pair & 1
        slot = begin + pair * 128 + W * 64
        logits = _logits(q_s, pe_s, values, keys, full, phase, pair >> 30, W, logit)
        if W == 1:
            # The even tile's part comes first, and runs on while the odd tile's weights are worked out.
            top, total, acc = _other(values, keys, tops, topped, weighed, top, total, acc, phase, W, logit, output)
        top, total, rounded, fade = _weigh(
            logits, keys, tops, topped, weighed, top, total, slot, low, high, least, most, scale_log2, W, logit
        )
        if W == 1:
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(1), count=1)
        acc = _own(rounded, fade, values, free, acc, W, output)
        if W == 0:
            top, total, acc = _other(values, keys, tops, topped, weighed, top, total, acc, phase, W, logit, output)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(2), count=1)
    _finish(out, lse, totals, done, top, total, acc, b, split, first_row, queries, heads, splits, W, C, logit, output)


@gluon.jit(do_not_specialize=["slots", "splits", "window"])
def mla_split_hopper(
    q_latent, q_rope, latent, rope, lengths, starts, out, lse,
    queries, heads, scale_log2,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, c_b, c_s, r_b, r_s, slots, splits, window,
    C: gl.constexpr, R: gl.constexpr, LENGTHS: gl.constexpr, STARTS: gl.constexpr,
):  # fmt: skip
    """As ``mla_split``, for a positive scale: out [B, T * H, splits, C] normalised, lse [B, T * H, splits] in base e.

    Launched with four warps, which are the first warpgroup; the others are its own.
    """
    dtype: gl.constexpr = latent.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    gdc_launch_dependents()
    q_s = gl.allocate_shared_memory(dtype, [2, 64, C // 2], shared)
    pe_s = gl.allocate_shared_memory(dtype, [1, 64, R], shared)
    values = gl.allocate_shared_memory(dtype, [4, 64, C // 2], shared)
    keys = gl.allocate_shared_memory(dtype, [2, 64, R], shared)
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    totals = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [4, 1], bar)
    topped = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    loaded = gl.allocate_shared_memory(gl.int64, [1], bar)
    done = gl.allocate_shared_memory(gl.int64, [1], bar)
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(topped.index(i), count=1)
        mbarrier.init(weighed.index(i), count=1)
    mbarrier.init(loaded, count=2)
    mbarrier.init(done, count=2)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_attend, (
                q_latent, q_rope, lengths, starts, out, lse, q_s, pe_s, values, keys, tops, totals,
                full, free, topped, weighed, loaded, done, queries, heads, scale_log2,
                ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, slots, splits, window, 0, C, R, LENGTHS, STARTS,
            )),
            (_attend, (
                q_latent, q_rope, lengths, starts, out, lse, q_s, pe_s, values, keys, tops, totals,
                full, free, topped, weighed, loaded, done, queries, heads, scale_log2,
                ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, slots, splits, window, 1, C, R, LENGTHS, STARTS,
            )),
            (_feed, (
                latent, rope, lengths, starts, values, keys, full, free, queries, c_b, c_s, r_b, r_s,
                slots, splits, window, C, R, LENGTHS, STARTS,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
