"""Kernels that quantise to FP8 E4M3, bit for bit as the torch reference does: IEEE division (see `quotient`), exact
powers of two."""

import triton
import triton.language as tl

from .grouped import expert_of


@triton.jit
def magnitude(value):
    """Bits of |value|: as integers they are in order, and NaN is above them all."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest(value, axis: tl.constexpr):
    """Bits of the largest magnitude along `axis`."""
    return tl.max(magnitude(value), axis)


@triton.jit
def scale_of(bits, floor, POWER: tl.constexpr):
    """Scale of blocks with these `largest` bits; infinity or NaN where the block holds one."""
    amax = bits.to(tl.float32, bitcast=True)
    size = tl.maximum(amax, floor)
    # size / 448 as IEEE division gives it: the error of the product is taken back.
    quotient = size * (1.0 / 448.0)
    rest = tl.fma(quotient, tl.zeros_like(size) - 448.0, size)
    scale = tl.fma(rest, tl.zeros_like(size) + 1.0 / 448.0, quotient)
    if POWER:
        # One more in the exponent unless the mantissa is zero.
        power = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = power.to(tl.float32, bitcast=True)
    # A maximum would drop a NaN, and infinity has no error to take back.
    return tl.where(bits >= 0x7F800000, amax, scale)


@triton.jit
def inverse(scale):
    """1 / scale, and the scale where it is finite: once a block, `quotient` takes them for each of its values."""
    # Scales are from 2^-126 to 2^120. A Newton step takes back the error of the square of 1 / sqrt, which costs less
    # than a division.
    root = tl.rsqrt(scale)
    rough = root * root
    # Under an infinite scale a finite value is 0: there is no error to take back.
    finite = tl.minimum(scale, 3.4028234663852886e38)
    rest = tl.fma(finite, -rough, tl.zeros_like(scale) + 1.0)
    return tl.fma(rest, rough, rough), finite


@triton.jit
def quotient(value, reciprocal, finite):
    """value / scale, rounded as IEEE division would: the reciprocal's error is taken back (Markstein), which is a
    fraction of the instructions. Signs of zero stay. Under scales below 2^-100 the error is subnormal, and a value
    within a rounding of the border between two codes may get the other one."""
    rounded = value * reciprocal
    # Times -1, and not minus, which is zero minus a value: -0 stays -0, and the product takes the sign for nothing.
    excess = tl.fma(rounded, tl.broadcast_to(finite, value.shape), value * -1.0)
    return tl.fma(excess * -1.0, tl.broadcast_to(reciprocal, value.shape), rounded)


@triton.jit
def encoded(value, scale):
    """E4M3 codes of value / scale."""
    reciprocal, finite = inverse(scale)
    return quotient(value, reciprocal, finite).to(tl.float8e4nv)


@triton.jit
def quantize_rows(
    x, up, codes, scale, rows, width, x_m, codes_m, scale_m, scale_g, floor,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, POWER: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """1 x GROUP tiles of [rows, width]. SWIGLU: of silu(x) * up, which share strides, rounded to x's dtype first."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, WIDE)
    col = tl.program_id(1) * GROUP + lane
    mask = (m < rows)[:, None] & ((lane < GROUP) & (col < width))[None, :]
    place = m.to(tl.int64)[:, None] * x_m + col[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if SWIGLU:
        other = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
        value = (value * tl.sigmoid(value) * other).to(x.dtype.element_ty).to(tl.float32)
    s = scale_of(largest(value, 1), floor, POWER)
    tl.store(scale + m.to(tl.int64) * scale_m + tl.program_id(1).to(tl.int64) * scale_g, s, mask=m < rows)
    tl.store(codes + m.to(tl.int64)[:, None] * codes_m + col[None, :], encoded(value, s[:, None]), mask=mask)


@triton.jit
def rows_of(offsets, group, experts, GROUP: tl.constexpr, BLOCK_E: tl.constexpr):
    """First row and end of a group where each expert's rows start one of their own; end -1 past the last expert."""
    e, first, end, before = expert_of(offsets, group, 1, experts, GROUP, BLOCK_E)
    start = first + (group - before) * GROUP
    stop = tl.minimum(start + GROUP, end)
    return start, tl.where(e < experts, stop, -1)


@triton.jit
def quantize_columns(
    x, codes, scale, offsets, rows, width, experts, x_m, codes_d, scale_d, scale_g, floor,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, BLOCK_E: tl.constexpr, POWER: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """GROUP x 1 tiles of [rows, width], written transposed. GROUPED: each expert's rows start a group of their own."""
    group = tl.program_id(0)
    start = group * GROUP
    stop = tl.minimum(start + GROUP, rows)
    if GROUPED:
        start, stop = rows_of(offsets, group, experts, GROUP, BLOCK_E)
        if stop < 0:
            return
    lane = tl.arange(0, WIDE)
    m = start + lane
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ((lane < GROUP) & (m < stop))[:, None] & (col < width)[None, :]
    value = tl.load(x + m.to(tl.int64)[:, None] * x_m + col[None, :], mask=mask, other=0.0).to(tl.float32)
    s = scale_of(largest(value, 0), floor, POWER)
    tl.store(scale + col.to(tl.int64) * scale_d + group.to(tl.int64) * scale_g, s, mask=col < width)
    last = group * GROUP + lane
    room = (lane < GROUP) & (GROUPED | (last < rows))
    place = col.to(tl.int64)[None, :] * codes_d + last[:, None]
    tl.store(codes + place, encoded(value, s[None, :]), mask=room[:, None] & (col < width)[None, :])


@triton.jit
def quantize_blocks(
    w, codes, scale, rows, cols, w_e, w_r, w_c, floor,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """One HEIGHT x WIDTH block of matrix program_id(2) of a stack; codes and scale are contiguous."""
    r = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    e = tl.program_id(2).to(tl.int64)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    place = e * w_e + r.to(tl.int64)[:, None] * w_r + c.to(tl.int64)[None, :] * w_c
    value = tl.load(w + place, mask=mask, other=0.0).to(tl.float32)
    s = scale_of(tl.max(largest(value, 1), 0), floor, POWER)
    across = tl.num_programs(1)
    tl.store(scale + (e * tl.num_programs(0) + tl.program_id(0)) * across + tl.program_id(1), s)
    tl.store(codes + (e * rows + r.to(tl.int64)[:, None]) * cols + c[None, :], encoded(value, s), mask=mask)


@triton.jit
def transpose_tiles(x, out, rows, cols, x_e, x_r, SIDE: tl.constexpr):
    """One SIDE x SIDE tile of matrix program_id(2) of a stack of bytes, turned; out [E, cols, rows] is contiguous."""
    r = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    c = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    e = tl.program_id(2).to(tl.int64)
    place = e * x_e + r.to(tl.int64)[:, None] * x_r + c[None, :]
    tile = tl.load(x + place, mask=(r < rows)[:, None] & (c < cols)[None, :])
    place = (e * cols + c.to(tl.int64)[:, None]) * rows + r[None, :]
    tl.store(out + place, tl.trans(tile), mask=(c < cols)[:, None] & (r < rows)[None, :])


@triton.jit
def widen_tiles(
    codes, scale, out, rows, cols, c_e, c_r, s_e, s_r, s_c,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A ROWS x COLS tile, within a block of HEIGHT x WIDTH, of matrix program_id(2) of a stack: codes times scale; out
    [E, rows, cols] is contiguous."""
    r0, c0 = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    r, c = r0 + tl.arange(0, ROWS), c0 + tl.arange(0, COLS)
    e = tl.program_id(2).to(tl.int64)
    live = (r < rows)[:, None] & (c < cols)[None, :]
    s = tl.load(scale + e * s_e + (r0 // HEIGHT).to(tl.int64) * s_r + (c0 // WIDTH) * s_c)
    value = tl.load(codes + e * c_e + r.to(tl.int64)[:, None] * c_r + c[None, :], mask=live, other=0.0)
    place = (e * rows + r.to(tl.int64)[:, None]) * cols + c[None, :]
    tl.store(out + place, (value.to(tl.float32) * s).to(out.dtype.element_ty), mask=live)
