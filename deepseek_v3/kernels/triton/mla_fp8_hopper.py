"""Kernel of the absorbed MLA decode over FP8 latents for few query rows on Hopper, in Gluon.

What the compiler cannot be talked into: codes are fetched by the copy engine a tile ahead, and widened once for both
products. The cached tokens are the tall operand (64 of them by 16 query rows), so the tensor cores' asynchronous
products serve as few as 16 rows. A group of 128 columns has a product of its own: its scale multiplies its part of
the logits, and the weights of its part of the output, and the codes themselves stay exact in float16.

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

from .mla_hopper import slots_of


@gluon.jit
def _fetch(code_tiles, rope_tiles, codes, ropes, bars, tile, slot, go):
    """Start the copy of 64 slots into buffer tile % 2, where ``go``: four pieces of 128 columns and the roped keys."""
    turn = tile % 2
    bar = bars.index(turn)
    mbarrier.expect(bar, 64 * (512 + 64 * 2), pred=go)
    for g in gl.static_range(4):
        tma.async_copy_global_to_shared(code_tiles, [slot, g * 128], bar, codes.index(turn * 4 + g), pred=go)
    tma.async_copy_global_to_shared(rope_tiles, [slot, 0], bar, ropes.index(turn), pred=go)


@gluon.jit
def _scales(scale, s_s, s_g, slot, last):
    """Scales of the four groups of the slots; past the last live slot that one's again, never a dead one's."""
    at = scale + gl.minimum(slot, last).to(gl.int64) * s_s
    return gl.load(at), gl.load(at + s_g), gl.load(at + 2 * s_g), gl.load(at + 3 * s_g)


@gluon.jit
def _power_above(x):
    """The power of two at or above each positive float32; 1 for zero."""
    bits = (x.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return gl.where(x > 0, bits.to(gl.float32, bitcast=True), 1.0)


@gluon.jit
def _queries(
    q_latent, q_rope, q_s, pe_s, first_row, queries, heads, ql_t, ql_h, qr_t, qr_h, WARPS: gl.constexpr
):  # fmt: skip
    """Queries of 16 rows into shared memory; their latent part in units of a power of two a row, which is returned.

    Float16, in which the codes are exact, has too little range for any query as it comes.
    """
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    row = first_row + gl.arange(0, 16, gl.SliceLayout(1, narrow))
    t = (row // heads).to(gl.int64)
    h = (row % heads).to(gl.int64)
    live = (row < queries * heads)[:, None]
    at = (q_latent + t * ql_t + h * ql_h)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, narrow))[None, :]
    q0 = gl.load(at, mask=live, other=0.0).to(gl.float32)
    q1 = gl.load(at + 128, mask=live, other=0.0).to(gl.float32)
    q2 = gl.load(at + 256, mask=live, other=0.0).to(gl.float32)
    q3 = gl.load(at + 384, mask=live, other=0.0).to(gl.float32)
    most = gl.maximum(gl.maximum(gl.abs(q0), gl.abs(q1)), gl.maximum(gl.abs(q2), gl.abs(q3)))
    unit = _power_above(gl.max(most, 1))
    q_s.index(0).store((q0 / unit[:, None]).to(gl.float16))
    q_s.index(1).store((q1 / unit[:, None]).to(gl.float16))
    q_s.index(2).store((q2 / unit[:, None]).to(gl.float16))
    q_s.index(3).store((q3 / unit[:, None]).to(gl.float16))
    at = (q_rope + t * qr_t + h * qr_h)[:, None] + gl.arange(0, 64, gl.SliceLayout(0, narrow))[None, :]
    pe_s.store(gl.load(at, mask=live, other=0.0))
    return unit


@gluon.jit
def _part(values, queries, g: gl.constexpr, logit: gl.constexpr):
    """Logits' part of one group, not waited for: [64 slots, 16 rows]."""
    zero = gl.zeros([64, 16], gl.float32, logit)
    return warpgroup_mma(values.index(g), queries.index(g).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _logits(values, q_s, pe, pe_s, unit, s0, s1, s2, s3, logit: gl.constexpr):
    """Logits [64 slots, 16 rows]: each group's part times its slots' scale, and the roped part."""
    part0 = _part(values, q_s, 0, logit)
    part1 = _part(values, q_s, 1, logit)
    part2 = _part(values, q_s, 2, logit)
    part3 = _part(values, q_s, 3, logit)
    zero = gl.zeros([64, 16], gl.float32, logit)
    part4 = warpgroup_mma(pe, pe_s.permute((1, 0)), zero, use_acc=False, is_async=True)
    part0, part1, part2, part3, part4 = warpgroup_mma_wait(0, deps=[part0, part1, part2, part3, part4])
    logits = part0 * s0[:, None] + part1 * s1[:, None] + part2 * s2[:, None] + part3 * s3[:, None]
    return logits * unit[None, :] + part4


@gluon.jit
def _step(logits, top, spread):
    """New maximum over the slots and spread sum of base-2 logits, the weights, and how much the past fades."""
    new_top = gl.maximum(top, gl.max(logits, 0))
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(logits - base[None, :])
    fade = gl.exp2(top - base)
    return new_top, spread * fade[None, :] + weights, weights, fade


@gluon.jit
def _mix(values, weights, acc, g: gl.constexpr):
    """Adds one group's part of the output, transposed, not waited for: [128 columns, 16 rows]."""
    return warpgroup_mma(values.index(g).permute((1, 0)), weights.index(g), acc, is_async=True)


@gluon.jit
def _store(out, acc, place, largest, total, live, g: gl.constexpr, output: gl.constexpr):
    col = g * 128 + gl.arange(0, 128, gl.SliceLayout(1, output))
    value = acc * (largest / gl.convert_layout(total, gl.SliceLayout(0, output)))[None, :]
    gl.store(out + place[None, :] * 512 + col[:, None], value.to(out.dtype.element_ty), mask=live[None, :])


@gluon.jit(do_not_specialize=["slots", "splits", "window"])
def mla_split_fp8_hopper(
    q_latent, q_rope, latent, rope, latent_scale, lengths, starts, out, lse,
    queries, heads, scale_log2,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, c_b, c_s, r_b, r_s, s_b, s_s, s_g, slots, splits, window,
    LENGTHS: gl.constexpr, STARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As ``mla_split`` for C = 512, R = 64: out [B, T * H, splits, C] normalised, lse [B, T * H, splits]."""
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    byte: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    small: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    logit: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 64 // WARPS, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 16, 16])
    linear: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    split = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    first_row = gl.program_id(0) * 16

    q_s = gl.allocate_shared_memory(gl.float16, [4, 16, 128], half)
    pe_s = gl.allocate_shared_memory(rope.dtype.element_ty, [16, 64], half)
    unit = _queries(
        q_latent + b * ql_b, q_rope + b * qr_b, q_s, pe_s, first_row, queries, heads, ql_t, ql_h, qr_t, qr_h, WARPS
    )
    unit = gl.convert_layout(unit, gl.SliceLayout(0, logit))

    row = first_row + gl.arange(0, 16, gl.SliceLayout(0, logit))
    length, begin, tiles, low, high = slots_of(
        lengths, starts, b, row // heads, split, queries, slots, splits, window, LENGTHS, STARTS
    )
    last = gl.maximum(length - 1, 0)

    room = gl.maximum(length, 1)
    code_tiles = tma.make_tensor_descriptor(latent + b * c_b, [room, 512], [c_s, 1], [64, 128], byte)
    rope_tiles = tma.make_tensor_descriptor(rope + b * r_b, [room, 64], [r_s, 1], [64, 64], half)
    codes = gl.allocate_shared_memory(latent.dtype.element_ty, [8, 64, 128], byte)
    ropes = gl.allocate_shared_memory(rope.dtype.element_ty, [2, 64, 64], half)
    values = gl.allocate_shared_memory(gl.float16, [4, 64, 128], half)
    weight_s = gl.allocate_shared_memory(gl.float16, [4, 64, 16], small)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    fence_async_shared()
    gl.thread_barrier()
    _fetch(code_tiles, rope_tiles, codes, ropes, bars, 0, begin, tiles > 0)

    top = gl.full([16], float("-inf"), gl.float32, gl.SliceLayout(0, logit))
    spread = gl.zeros([64, 16], gl.float32, logit)
    largest = 0.0
    acc0 = gl.zeros([128, 16], gl.float32, output)
    acc1 = gl.zeros([128, 16], gl.float32, output)
    acc2 = gl.zeros([128, 16], gl.float32, output)
    acc3 = gl.zeros([128, 16], gl.float32, output)
    lane = gl.arange(0, 64, gl.SliceLayout(1, logit))
    scale = latent_scale + b * s_b
    s0, s1, s2, s3 = _scales(scale, s_s, s_g, begin + lane, last)
    for i in range(tiles):
        # All warps are through with the other buffer, the widened values and the weights.
        gl.thread_barrier()
        _fetch(code_tiles, rope_tiles, codes, ropes, bars, i + 1, begin + (i + 1) * 64, i + 1 < tiles)
        n0, n1, n2, n3 = _scales(scale, s_s, s_g, begin + (i + 1) * 64 + lane, last)
        mbarrier.wait(bars.index(i % 2), i // 2 & 1)
        for g in gl.static_range(4):
            values.index(g).store(codes.index(i % 2 * 4 + g).load(linear).to(gl.float16))
        fence_async_shared()
        gl.thread_barrier()
        logits = _logits(values, q_s, ropes.index(i % 2), pe_s, unit, s0, s1, s2, s3, logit)
        slot = (begin + i * 64 + lane)[:, None]
        logits = gl.where((slot < high[None, :]) & (slot >= low[None, :]), logits * scale_log2, float("-inf"))
        top, spread, weights, fade = _step(logits, top, spread)
        # Weights times scales are taken relative to the largest scale so far, again for float16's sake.
        size = gl.maximum(gl.maximum(s0, s1), gl.maximum(s2, s3))
        new_largest = gl.maximum(largest, _power_above(gl.max(size, 0)))
        fade = gl.convert_layout(fade * (largest / new_largest), gl.SliceLayout(0, output))[None, :]
        largest = new_largest
        weight_s.index(0).store((weights * (s0 / largest)[:, None]).to(gl.float16))
        weight_s.index(1).store((weights * (s1 / largest)[:, None]).to(gl.float16))
        weight_s.index(2).store((weights * (s2 / largest)[:, None]).to(gl.float16))
        weight_s.index(3).store((weights * (s3 / largest)[:, None]).to(gl.float16))
        fence_async_shared()
        gl.thread_barrier()
        acc0 = _mix(values, weight_s, acc0 * fade, 0)
        acc1 = _mix(values, weight_s, acc1 * fade, 1)
        acc2 = _mix(values, weight_s, acc2 * fade, 2)
        acc3 = _mix(values, weight_s, acc3 * fade, 3)
        acc0, acc1, acc2, acc3 = warpgroup_mma_wait(0, deps=[acc0, acc1, acc2, acc3])
        s0, s1, s2, s3 = n0, n1, n2, n3

    total = gl.sum(spread, 0)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    # 0.6931... is ln 2: the log-sum-exp is handed on in base e.
    value = gl.where(empty, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
    gl.store(lse + (b * queries * heads + row) * splits + split, value, mask=row < queries * heads)
    row = first_row + gl.arange(0, 16, gl.SliceLayout(0, output))
    place = (b * queries * heads + row) * splits + split
    live = row < queries * heads
    _store(out, acc0, place, largest, total, live, 0, output)
    _store(out, acc1, place, largest, total, live, 1, output)
    _store(out, acc2, place, largest, total, live, 2, output)
    _store(out, acc3, place, largest, total, live, 3, output)
