"""Kernel of the absorbed MLA decode over FP8 latents for few query rows on Hopper, in Gluon.

A program has 16 rows, as many as the tensor cores' smaller products take, so that no row of theirs is idle. Each of
its four warps owns a group of 128 of the 512 columns, with scales of its own: it reads their codes alone, for its
part of the logits and for its part of the output. The parts of the logits are added up through shared memory, the one
thing for which the warps meet; each then works out all weights for itself.

Codes are widened to float16, in which they are exact, in registers on their way from shared memory to the products. So
that a thread's 16 bytes hold what its registers need, the columns that the products see are permuted: those that they
sum over in any order, and those of the output, which are put back in order as the registers are named.

The copy engine fetches a tile ahead, and two programs share a multiprocessor. Deterministic: the split depends on
shapes alone and the splits are joined in order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents

from .mla_hopper import share_of


@gluon.constexpr_function
def layout_of(kind, slots=16):
    """How the registers, lanes and warps hold [slots, columns], or the output [rows, columns]; 128 columns a warp.

    No two lanes that read at once ask the same bank of shared memory.
    """

    def columns(*powers):
        return [[0, power] for power in powers]

    tokens = [[1 << power, 0] for power in range(slots.bit_length() - 1)]
    warps, shape = columns(128, 256), [slots, 512]
    if kind == "values":
        registers, lanes = columns(1, 2, 4, 8) + tokens[:1] + tokens[3:], tokens[1:3] + columns(16, 32, 64)
    elif kind == "ropes":
        registers, lanes, warps = columns(1, 8) + tokens[3:], columns(2, 4) + tokens[:3], columns(16, 32)
        shape = [slots, 64]
    elif kind == "stored":  # a row of a warp's columns at a time
        registers, lanes = columns(1, 2) + tokens, columns(4, 8, 16, 32, 64)
    else:  # the keys, and the output
        registers, lanes = columns(1, 2, 4, 8, 16) + tokens[3:], columns(32, 64) + tokens[:3]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.constexpr_function
def parts_of(slots):
    """How every warp holds all four parts of the logits, [4, 16 rows, slots]."""
    registers = [[0, 0, 1], [0, 8, 0], *([0, 0, 8 << i] for i in range((slots // 8).bit_length() - 1))]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    registers += [[1, 0, 0], [2, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0, 0], [0, 0, 0]], [], [4, 16, slots])


@gluon.jit
def _fetch(
    code_tiles, rope_tiles, codes, ropes, full, tile, slot, go, N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Start the copy of a tile into buffer tile % STAGES, where ``go``."""
    turn = tile % STAGES
    bar = full.index(turn)
    mbarrier.expect(bar, N * (512 + 128), pred=go)
    tma.async_copy_global_to_shared(code_tiles, [slot, 0], bar, codes.index(turn), pred=go)
    tma.async_copy_global_to_shared(rope_tiles, [slot, 0], bar, ropes.index(turn), pred=go)


@gluon.jit
def _power_above(x):
    """The power of two at or above each positive float32; 1 for zero."""
    bits = (x.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return gl.where(x > 0, bits.to(gl.float32, bitcast=True), 1.0)


@gluon.jit
def _along(x, axis: gl.constexpr):
    """[n] as [4, 16, columns] of one number a group (axis 0) or a row (axis 1)."""
    if axis == 0:
        return gl.expand_dims(gl.expand_dims(x, 1), 1)
    else:
        return gl.expand_dims(gl.expand_dims(x, 1), 0)


@gluon.jit
def _queries(
    q_latent, q_rope, first_row, queries, heads, ql_t, ql_h, qr_t, qr_h, mma: gl.constexpr
):  # fmt: skip
    """Queries of 16 rows, [4, 16, 128] in the columns' order of ``_keys`` and [4, 16, 16]; and their unit.

    Float16 has too little range for any query as it comes: a row's are in units of a power of two.
    """
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = first_row + gl.arange(0, 16, gl.SliceLayout(1, narrow))
    at = (row // heads).to(gl.int64) * qr_t + (row % heads).to(gl.int64) * qr_h
    col = gl.arange(0, 64, gl.SliceLayout(0, narrow))
    pe = gl.load(q_rope + at[:, None] + col[None, :], mask=(row < queries * heads)[:, None], other=0.0)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = first_row + gl.arange(0, 16, gl.SliceLayout(1, wide))
    at = (row // heads).to(gl.int64) * ql_t + (row % heads).to(gl.int64) * ql_h
    col = gl.arange(0, 512, gl.SliceLayout(0, wide))
    q = gl.load(q_latent + at[:, None] + col[None, :], mask=(row < queries * heads)[:, None], other=0.0)
    q = q.to(gl.float32)
    most = gl.convert_layout(gl.max(gl.abs(pe.to(gl.float32)), 1), gl.SliceLayout(1, wide))
    unit = _power_above(gl.maximum(gl.max(gl.abs(q), 1), most))
    q = (q / unit[:, None]).to(gl.float16).reshape([16, 4, 4, 2, 4, 2, 2]).permute(1, 0, 3, 4, 5, 2, 6)
    q = gl.convert_layout(q.reshape([4, 16, 128]), gl.DotOperandLayout(0, mma, 2))
    pe = pe.to(gl.float32) / gl.convert_layout(unit, gl.SliceLayout(1, narrow))[:, None]
    pe = pe.to(q_rope.dtype.element_ty).reshape([16, 4, 16]).permute(1, 0, 2)
    pe = gl.convert_layout(pe, gl.DotOperandLayout(0, mma, 2))
    return q, pe, gl.convert_layout(unit, gl.SliceLayout(1, gl.SliceLayout(0, mma)))


@gluon.jit
def _scales(scale, slot, length, N: gl.constexpr, S_S: gl.constexpr, mma: gl.constexpr):
    """[4, N], of the groups of N slots; past the last live slot that one's again, never a dead one's."""
    lane = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, mma)))
    group = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(1, mma)))
    if slot + N <= length:
        # Nothing but one address to compute.
        size = gl.load(scale + slot.to(gl.int64) * S_S + (group[:, None] + lane[None, :] * S_S))
    else:
        at = gl.minimum(slot + lane, gl.maximum(length - 1, 0)).to(gl.int64) * S_S
        size = gl.load(scale + at[None, :] + group[:, None])
    return size


@gluon.jit
def _keys(codes, N: gl.constexpr, mma: gl.constexpr):
    """A tile as the logits' operand, [4, 128 columns, N slots], the columns permuted."""
    k = codes.load(layout_of("keys", N)).to(gl.float16)
    k = k.reshape([N, 4, 4, 2, 4, 2, 2]).permute(1, 3, 4, 5, 2, 6, 0).reshape([4, 128, N])
    return gl.convert_layout(k, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)


@gluon.jit
def _roped(ropes, N: gl.constexpr, mma: gl.constexpr):
    """A tile's roped keys, [4, 16 columns, N slots]: a quarter of the columns a warp."""
    k = ropes.load(layout_of("ropes", N)).reshape([N, 4, 16]).permute(1, 2, 0)
    return gl.convert_layout(k, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)


@gluon.jit
def _values(codes, N: gl.constexpr, mma: gl.constexpr):
    """A tile as the output's operand, [4, N slots, 128 columns], the columns permuted."""
    v = codes.load(layout_of("values", N)).to(gl.float16)
    v = v.reshape([N, 4, 8, 16]).permute(1, 0, 3, 2).reshape([4, N, 128])
    return gl.convert_layout(v, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)


@gluon.jit
def _in_order(acc):
    """The output [4, 16, 128] as [16, 512], its columns put back in order, as whole lines are stored."""
    acc = acc.reshape([4, 16, 16, 8]).permute(1, 0, 3, 2).reshape([16, 512])
    acc = gl.convert_layout(acc, layout_of("output"), assert_trivial=True)
    return gl.convert_layout(acc, layout_of("stored"))


@gluon.jit
def _joined(parts, N: gl.constexpr, mma: gl.constexpr):
    """The sum [16, N] of the warps' parts [4, 16, N], in order, for each warp."""
    return gl.convert_layout(gl.sum(parts.load(parts_of(N)), 0), gl.SliceLayout(0, mma), assert_trivial=True)


@gluon.jit
def _step(logits, unit, top, total):
    """New maximum and sum of base-2 logits in a positive unit a row, the weights, and how much the past fades."""
    new_top = gl.maximum(top, gl.max(logits, 1) * unit)
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(logits * unit[:, None] - base[:, None])
    fade = gl.exp2(top - base)
    return new_top, total * fade + gl.sum(weights, 1), weights, fade


@gluon.jit
def _store(out, acc, b, split, first_row, queries, heads, splits):
    flat: gl.constexpr = acc.type.layout
    row = first_row + gl.arange(0, 16, gl.SliceLayout(1, flat))
    place = (b * queries * heads + row) * splits + split
    at = out + place[:, None] * 512 + gl.arange(0, 512, gl.SliceLayout(0, flat))[None, :]
    gl.store(at, acc.to(out.dtype.element_ty), mask=(row < queries * heads)[:, None])


@gluon.jit(do_not_specialize=["slots", "splits", "window"])
def mla_split_fp8_hopper(
    q_latent, q_rope, latent, rope, latent_scale, lengths, starts, out, lse,
    queries, heads, scale_log2,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, c_b, c_s, r_b, r_s, s_b, slots, splits, window,
    LENGTHS: gl.constexpr, STARTS: gl.constexpr, STAGES: gl.constexpr, N: gl.constexpr,
    LONG: gl.constexpr, S_S: gl.constexpr,
):  # fmt: skip
    """As ``mla_split`` for C = 512, R = 64: out [B, T * H, splits, C] normalised, lse [B, T * H, splits]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, mma))
    byte: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    gdc_launch_dependents()
    split = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    first_row = gl.program_id(0) * 16
    row = first_row + gl.arange(0, 16, rows)
    length, begin, tiles, low, high = share_of(
        lengths, starts, b, row // heads, split, queries, slots, splits, window, N, LONG, LENGTHS, STARTS
    )
    # A tile from ``least`` to ``most`` every query sees whole.
    least = gl.max(low, 0)
    most = length - (queries - 1)
    # Descriptors that end at this row's length: the copy engine fills what lies beyond with zeros.
    room = gl.maximum(length, 1)
    code_tiles = tma.make_tensor_descriptor(latent + b * c_b, [room, 512], [c_s, 1], [N, 512], byte)
    rope_tiles = tma.make_tensor_descriptor(rope + b * r_b, [room, 64], [r_s, 1], [N, 64], half)
    codes = gl.allocate_shared_memory(latent.dtype.element_ty, [STAGES, N, 512], byte)
    ropes = gl.allocate_shared_memory(rope.dtype.element_ty, [STAGES, N, 64], half)
    parts = gl.allocate_shared_memory(gl.float32, [4, 16, N], gl.SwizzledSharedLayout(8, 1, N // 8, [2, 1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        _fetch(code_tiles, rope_tiles, codes, ropes, full, i, begin + i * N, i < tiles, N, STAGES)
    q, pe, unit = _queries(
        q_latent + b * ql_b, q_rope + b * qr_b, first_row, queries, heads, ql_t, ql_h, qr_t, qr_h, mma
    )
    # Not zero, which would make NaN of what is masked.
    unit = gl.maximum(unit * scale_log2, 1e-37)
    scale = latent_scale + b * s_b
    next_size = _scales(scale, begin, length, N, S_S, mma)

    top = gl.full([16], float("-inf"), gl.float32, rows)
    total = gl.zeros([16], gl.float32, rows)
    largest = gl.zeros([4], gl.float32, gl.SliceLayout(1, gl.SliceLayout(1, mma)))
    acc = gl.zeros([4, 16, 128], gl.float32, mma)
    for i in range(tiles):
        turn = i % STAGES
        # All warps are through with the tile before this one and with the parts of its logits.
        gl.thread_barrier()
        ahead = i - 1 + STAGES
        go = (i > 0) & (ahead < tiles)
        _fetch(code_tiles, rope_tiles, codes, ropes, full, ahead, begin + ahead * N, go, N, STAGES)
        # After the fence of the copies, which would wait for these reads.
        size = next_size
        next_size = _scales(scale, begin + (i + 1) * N, length, N, S_S, mma)
        mbarrier.wait(full.index(turn), i // STAGES & 1)
        part = mma_v2(q, _keys(codes.index(turn), N, mma), gl.zeros([4, 16, N], gl.float32, mma))
        part = part * gl.expand_dims(size, 1)
        parts.store(mma_v2(pe, _roped(ropes.index(turn), N, mma), part))
        gl.thread_barrier()
        logits = _joined(parts, N, mma)
        here = begin + i * N
        if (here < least) | (here + N > most):
            slot = here + gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(0, mma)))
            seen = (slot[None, :] < high[:, None]) & (slot[None, :] >= low[:, None])
            logits = gl.where(seen, logits, float("-inf"))
        top, total, weights, fade = _step(logits, unit, top, total)
        # Weights times scales are taken relative to the group's largest scale so far, again for float16's sake.
        new_largest = gl.maximum(largest, _power_above(gl.max(size, 1)))
        fades = _along(fade, 1) * _along(largest / new_largest, 0)
        largest = new_largest
        rounded = (gl.expand_dims(weights, 0) * gl.expand_dims(size * gl.expand_dims(1.0 / largest, 1), 1)).to(
            gl.float16
        )
        rounded = gl.convert_layout(rounded, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
        acc = mma_v2(rounded, _values(codes.index(turn), N, mma), acc * fades)

    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    # 0.6931... is ln 2: the log-sum-exp is handed on in base e.
    value = gl.where(empty, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
    gl.store(lse + (b * queries * heads + row) * splits + split, value, mask=row < queries * heads)
    acc = acc * _along(largest, 0)
    _store(out, _in_order(acc / _along(total, 1)), b, split, first_row, queries, heads, splits)
