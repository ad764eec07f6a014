"""Kernels that pack to 12-bit E5M6 and back, bit for bit as the torch reference does."""

import triton
import triton.language as tl


@triton.jit
def encode(value, reciprocal):
    """12-bit codes of values under their rows' power-of-two scales, whose reciprocals are exact."""
    small = tl.abs(value) * reciprocal[:, None]
    bits = small.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) >> 17) - 7168
    # Adding 1.5 * 2^23 rounds to an integer, ties to even.
    tiny = (tl.where(small < 0.0001, small, 0.0) * 1048576.0 + 12582912.0) - 12582912.0
    code = tl.where(small < 0.00006103515625, tiny.to(tl.int32), normal)
    code = tl.minimum(tl.maximum(code, 0), 2047)
    return code | ((value < 0).to(tl.int32) << 11)


@triton.jit
def decode(code, scale):
    magnitude = code & 2047
    normal = ((magnitude + 7168) << 17).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 64, magnitude.to(tl.float32) * 9.5367431640625e-07, normal) * scale[:, None]
    return tl.where(code >> 11 == 1, -value, value)


@triton.jit
def pack_tiles(x, high, low, scale, rows, width, x_m, groups, BLOCK: tl.constexpr):
    """BLOCK rows of one tile of 128 columns, taken as two halves of 64; planes and scale are contiguous."""
    m = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    group = tl.program_id(1)
    lane = tl.arange(0, 64)
    col = group * 128 + lane
    live = (m < rows)[:, None]
    place = x + m[:, None] * x_m + col[None, :]
    left = tl.load(place, mask=live & (col < width)[None, :], other=0.0).to(tl.float32)
    right = tl.load(place + 64, mask=live & (col + 64 < width)[None, :], other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(left), 1), tl.max(tl.abs(right), 1))
    broken = tl.max((left != left).to(tl.int32) | (right != right).to(tl.int32), 1) > 0
    ratio = tl.div_rn(tl.maximum(amax, 130048.0 * 7.888609052210118e-31), 130048.0)
    bits = (ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    s = tl.where(broken | (amax == float("inf")), float("nan"), bits.to(tl.float32, bitcast=True))
    tl.store(scale + m * groups + group, s, mask=m < rows)
    reciprocal = tl.div_rn(1.0, s)
    a, b = encode(left, reciprocal), encode(right, reciprocal)
    wide = high + m[:, None] * (groups * 128) + col[None, :]
    tl.store(wide, (a >> 4).to(tl.uint8), mask=live)
    tl.store(wide + 64, (b >> 4).to(tl.uint8), mask=live)
    both = (a & 15) | ((b & 15) << 4)
    tl.store(low + m[:, None] * (groups * 64) + (group * 64 + lane)[None, :], both.to(tl.uint8), mask=live)


@triton.jit
def unpack_tiles(high, low, scale, out, rows, width, groups, BLOCK: tl.constexpr):
    """The inverse, out is contiguous [rows, width]."""
    m = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    group = tl.program_id(1)
    lane = tl.arange(0, 64)
    col = group * 128 + lane
    live = (m < rows)[:, None]
    s = tl.load(scale + m * groups + group, mask=m < rows, other=0.0)
    wide = high + m[:, None] * (groups * 128) + col[None, :]
    both = tl.load(low + m[:, None] * (groups * 64) + (group * 64 + lane)[None, :], mask=live, other=0).to(tl.int32)
    left = decode((tl.load(wide, mask=live, other=0).to(tl.int32) << 4) | (both & 15), s)
    right = decode((tl.load(wide + 64, mask=live, other=0).to(tl.int32) << 4) | (both >> 4), s)
    place = out + m[:, None] * width + col[None, :]
    tl.store(place, left.to(out.dtype.element_ty), mask=live & (col < width)[None, :])
    tl.store(place + 64, right.to(out.dtype.element_ty), mask=live & (col + 64 < width)[None, :])
