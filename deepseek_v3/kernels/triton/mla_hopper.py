"""Kernel of the absorbed MLA decode for many query rows on Hopper, in Gluon: the layouts are chosen by hand.

64 rows by 64 cached tokens, two warpgroups side by side: each computes the logits of its 32 tokens and then, with the
weights passed through shared memory, its half of the 512 output columns. So no product is done twice, which is what
the compiler's own choice for a product that feeds a product comes to. Two whole tiles of the cache are in shared
memory; the copy engine fetches the next one during all the work on this one. The sum of the weights stays spread over
the threads and is added up once at the end.

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


@gluon.jit
def slots_of(
    lengths, starts, b, t, split, queries, slots, splits, window, LENGTHS: gl.constexpr, STARTS: gl.constexpr
):  # fmt: skip
    """Batch row b's length, the first slot and the tiles of 64 of one split, and [low, high) of each query t."""
    length = slots
    if LENGTHS:
        length = gl.minimum(gl.load(lengths + b).to(gl.int32), slots)
    start = 0
    if STARTS:
        start = gl.maximum(gl.load(starts + b).to(gl.int32), 0)
    high = length - (queries - 1 - t)
    low = gl.maximum(start, high - window)
    first = gl.maximum(start, length - (queries - 1) - window)
    share = (gl.maximum(length - first, 0) + 63) // 64
    share = (share + splits - 1) // splits * 64
    begin = first + split * share
    return length, begin, (gl.minimum(begin + share, length) - begin + 63) // 64, low, high


@gluon.jit
def _fetch(latent_tiles, rope_tiles, latents, ropes, bars, tile, slot, go, C: gl.constexpr, R: gl.constexpr):
    """Start the copy of 64 slots into buffer tile % 2, where ``go``."""
    turn = tile % 2
    bar = bars.index(turn)
    mbarrier.expect(bar, 64 * (C + R) * 2, pred=go)
    tma.async_copy_global_to_shared(latent_tiles, [slot, 0], bar, latents.index(turn), pred=go)
    tma.async_copy_global_to_shared(rope_tiles, [slot, 0], bar, ropes.index(turn), pred=go)


@gluon.jit(do_not_specialize=["slots", "splits", "window"])
def mla_split_hopper(
    q_latent, q_rope, latent, rope, lengths, starts, out, lse,
    queries, heads, scale_log2,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, c_b, c_s, r_b, r_s, slots, splits, window,
    C: gl.constexpr, R: gl.constexpr, LENGTHS: gl.constexpr, STARTS: gl.constexpr,
):  # fmt: skip
    """As ``mla_split``: out [B, T * H, splits, C] normalised, lse [B, T * H, splits] in base e."""
    dtype: gl.constexpr = latent.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    logit: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    linear: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    split = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    first_row = gl.program_id(0) * 64

    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, linear))
    at = b * ql_b + (row // heads).to(gl.int64) * ql_t + (row % heads).to(gl.int64) * ql_h
    col = gl.arange(0, C, gl.SliceLayout(0, linear))
    q = gl.load(q_latent + at[:, None] + col[None, :], mask=(row < queries * heads)[:, None], other=0.0)
    q_s = gl.allocate_shared_memory(dtype, [64, C], shared, q)
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, narrow))
    at = b * qr_b + (row // heads).to(gl.int64) * qr_t + (row % heads).to(gl.int64) * qr_h
    col = gl.arange(0, R, gl.SliceLayout(0, narrow))
    q = gl.load(q_rope + at[:, None] + col[None, :], mask=(row < queries * heads)[:, None], other=0.0)
    pe_s = gl.allocate_shared_memory(dtype, [64, R], shared, q)

    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, logit))
    length, begin, tiles, low, high = slots_of(
        lengths, starts, b, row // heads, split, queries, slots, splits, window, LENGTHS, STARTS
    )
    # Descriptors that end at this row's length: the copy engine fills what lies beyond with zeros.
    room = gl.maximum(length, 1)
    latent_tiles = tma.make_tensor_descriptor(latent + b * c_b, [room, C], [c_s, 1], [64, C], shared)
    rope_tiles = tma.make_tensor_descriptor(rope + b * r_b, [room, R], [r_s, 1], [64, R], shared)
    latents = gl.allocate_shared_memory(dtype, [2, 64, C], shared)
    ropes = gl.allocate_shared_memory(dtype, [2, 64, R], shared)
    weight_s = gl.allocate_shared_memory(dtype, [64, 64], shared)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    fence_async_shared()
    gl.thread_barrier()
    _fetch(latent_tiles, rope_tiles, latents, ropes, bars, 0, begin, tiles > 0, C, R)

    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, logit))
    spread = gl.zeros([64, 64], gl.float32, logit)
    acc = gl.zeros([64, C], gl.float32, output)
    for i in range(tiles):
        # Both warpgroups are through with the other buffer, and with the weights.
        gl.thread_barrier()
        _fetch(latent_tiles, rope_tiles, latents, ropes, bars, i + 1, begin + (i + 1) * 64, i + 1 < tiles, C, R)
        mbarrier.wait(bars.index(i % 2), i // 2 & 1)
        tile = latents.index(i % 2)
        logits = gl.zeros([64, 64], gl.float32, logit)
        logits = warpgroup_mma(q_s, tile.permute((1, 0)), logits, use_acc=False, is_async=True)
        logits = warpgroup_mma(pe_s, ropes.index(i % 2).permute((1, 0)), logits, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        slot = begin + i * 64 + gl.arange(0, 64, gl.SliceLayout(0, logit))
        seen = (slot[None, :] < high[:, None]) & (slot[None, :] >= low[:, None])
        logits = gl.where(seen, logits * scale_log2, float("-inf"))
        new_top = gl.maximum(top, gl.max(logits, 1))
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        weights = gl.exp2(logits - base[:, None])
        fade = gl.exp2(top - base)
        spread = spread * fade[:, None] + weights
        top = new_top
        weight_s.store(weights.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, output))[:, None]
        acc = warpgroup_mma(weight_s, tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    total = gl.sum(spread, 1)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    # 0.6931... is ln 2: the log-sum-exp is handed on in base e.
    value = gl.where(empty, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
    place = (b * queries * heads + row) * splits + split
    gl.store(lse + place, value, mask=row < queries * heads)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, output))[:, None]
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, output))
    col = gl.arange(0, C, gl.SliceLayout(0, output))
    place = (b * queries * heads + row) * splits + split
    gl.store(
        out + place[:, None] * C + col[None, :], acc.to(out.dtype.element_ty), mask=(row < queries * heads)[:, None]
    )
