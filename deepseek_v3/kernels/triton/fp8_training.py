"""Kernels of FP8 training between its products: re-tiling of kept codes, SwiGLU's backward from kept codes.

128 rows are read as four quarters, a with rows 4 i, b with rows 4 i + 1, c and d: a thread that has the same place of
each has four codes that lie side by side in the transposed result.
"""

import triton
import triton.language as tl

from .quantize import encoded, inverse, largest, magnitude, quotient, rows_of, scale_of


@triton.jit
def find_tiles(offsets, tiles, experts, BLOCK_E: tl.constexpr):
    """tiles [2, groups]: first row and end of a group of 128 where each expert's rows start one; end -1 past them."""
    group = tl.program_id(0)
    start, stop = rows_of(offsets, group, experts, 128, BLOCK_E)
    tl.store(tiles + group, start)
    tl.store(tiles + tl.num_programs(0) + group, stop)


@triton.jit
def bounds(tiles, rows, GROUPED: tl.constexpr):
    """First row and end of group program_id(0)."""
    group = tl.program_id(0)
    start = group * 128
    stop = tl.minimum(start + 128, rows)
    if GROUPED:
        start = tl.load(tiles + group)
        stop = tl.load(tiles + tl.num_programs(0) + group)
    return start, stop


@triton.jit
def taken(x, x_scale, source, m, stop, col, width, x_m, xs_m, SCALED: tl.constexpr, GATHER: tl.constexpr):
    """float32 values of rows m before stop, 0 elsewhere; SCALED: codes, whose columns share one scale a row."""
    live = m < stop
    row = m.to(tl.int64)
    if GATHER:
        row = tl.load(source + row, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (col < width)[None, :]
    value = tl.load(x + (row * x_m)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        value = value * tl.load(x_scale + row * xs_m, mask=live, other=0.0)[:, None]
    return value


@triton.jit
def quarters(x, x_scale, source, m, stop, col, width, x_m, xs_m, SCALED: tl.constexpr, GATHER: tl.constexpr):
    a = taken(x, x_scale, source, m, stop, col, width, x_m, xs_m, SCALED, GATHER)
    b = taken(x, x_scale, source, m + 1, stop, col, width, x_m, xs_m, SCALED, GATHER)
    c = taken(x, x_scale, source, m + 2, stop, col, width, x_m, xs_m, SCALED, GATHER)
    d = taken(x, x_scale, source, m + 3, stop, col, width, x_m, xs_m, SCALED, GATHER)
    return a, b, c, d


@triton.jit
def in_order(a, b, c, d):
    """[R, C] of each quarter -> [4 R, C]."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.permute(joined, (0, 2, 3, 1)).reshape(4 * a.shape[0], a.shape[1])


@triton.jit
def store_rows(value, codes, scale, m, rows, col, width, codes_m, scale_m, floor, POWER: tl.constexpr):
    """1 x 128 tiles: the columns of value are one."""
    value = value.to(tl.float32)
    s = scale_of(largest(value, 1), floor, POWER)
    tl.store(scale + m.to(tl.int64) * scale_m, s, mask=m < rows)
    mask = (m < rows)[:, None] & (col < width)[None, :]
    tl.store(codes + m.to(tl.int64)[:, None] * codes_m + col[None, :], encoded(value, s[:, None]), mask=mask)


@triton.jit
def store_columns(
    a, b, c, d, codes, scale, rows, col, width, codes_d, scale_d, scale_g, floor,
    POWER: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """The 128 x 1 tiles of group program_id(0), transposed, of its quarters."""
    group = tl.program_id(0)
    most = tl.maximum(tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d)))
    s = scale_of(tl.max(most, 0), floor, POWER)
    tl.store(scale + col.to(tl.int64) * scale_d + group.to(tl.int64) * scale_g, s, mask=col < width)
    reciprocal, finite = inverse(s)
    reciprocal, finite = reciprocal[None, :], finite[None, :]
    a, b = quotient(a, reciprocal, finite), quotient(b, reciprocal, finite)
    c, d = quotient(c, reciprocal, finite), quotient(d, reciprocal, finite)
    last = group * 128 + tl.arange(0, 128)
    mask = ((last < rows) | GROUPED)[:, None] & (col < width)[None, :]
    # In order before they are rounded: so four codes become one word in two instructions.
    place = col.to(tl.int64)[None, :] * codes_d + last[:, None]
    tl.store(codes + place, in_order(a, b, c, d).to(tl.float8e4nv), mask=mask)


@triton.jit
def retile_columns(
    x, x_scale, source, codes, scale, tiles, rows, width, x_m, xs_m, xs_g, codes_d, scale_d, scale_g, floor,
    BLOCK: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """128 x 1 tiles, transposed, of rows of x (times their 1 x 128 scales): row m is source[m] where GATHER."""
    start, stop = bounds(tiles, rows, GROUPED)
    if stop < 0:
        return
    m = start + 4 * tl.arange(0, 32)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Four columns a thread: few scales to compute for many values.
    near = tl.max_contiguous(col, 4)
    scales = x_scale
    if SCALED:
        # BLOCK divides 128: these columns share one scale a row.
        scales = x_scale + (tl.program_id(1) * BLOCK // 128).to(tl.int64) * xs_g
    a, b, c, d = quarters(x, scales, source, m, stop, near, width, x_m, xs_m, SCALED, GATHER)
    store_columns(a, b, c, d, codes, scale, rows, col, width, codes_d, scale_d, scale_g, floor, POWER, GROUPED)


@triton.jit
def retile_both(
    x, codes, scale, along, along_scale, rows, width, x_m, codes_d, scale_d, scale_g, along_m, as_m, as_g, floor,
    SIDE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Of a 128 x 128 tile of x the 128 x 1 tiles of SIDE columns, transposed, or the 1 x 128 tiles of SIDE rows, as
    they lie. A program that did both would hold too much; what the second reads is still in the L2."""
    turns: tl.constexpr = 128 // SIDE
    piece = tl.program_id(1) // (2 * turns)
    turn = tl.program_id(1) % (2 * turns)
    start, stop = bounds(x, rows, False)
    if turn < turns:
        m = start + 4 * tl.arange(0, 32)
        col = piece * 128 + turn * SIDE + tl.arange(0, SIDE)
        near = tl.max_contiguous(col, 4)
        a, b, c, d = quarters(x, x, x, m, stop, near, width, x_m, 0, False, False)
        store_columns(a, b, c, d, codes, scale, rows, col, width, codes_d, scale_d, scale_g, floor, POWER, False)
    else:
        row = start + (turn - turns) * SIDE + tl.arange(0, SIDE)
        whole = piece * 128 + tl.arange(0, 128)
        value = taken(x, x, x, row, stop, whole, width, x_m, 0, False, False)
        beside = along_scale + piece.to(tl.int64) * as_g
        store_rows(value, along, beside, row, stop, whole, width, along_m, as_m, floor, POWER)


@triton.jit
def swiglu_codes(
    gate_up, codes, scale, kept, kept_scale, rows, width, gu_m, scale_m, scale_g, kept_m, kept_g, floor,
    BLOCK: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one 128-column tile of gate, of up and of their product, rounded to their dtype first."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.program_id(1).to(tl.int64)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (m < rows)[:, None] & (col < width)[None, :]
    place = gate_up + m.to(tl.int64)[:, None] * gu_m + col[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
    store_rows(gate, kept, kept_scale + piece * kept_g, m, rows, col, width, 2 * width, kept_m, floor, POWER)
    beside = kept_scale + (piece + width // 128) * kept_g
    store_rows(up, kept + width, beside, m, rows, col, width, 2 * width, kept_m, floor, POWER)
    product = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
    store_rows(product, codes, scale + piece * scale_g, m, rows, col, width, width, scale_m, floor, POWER)


@triton.jit
def swiglu_part(
    gate_up, gu_scale, grad, weights, m, stop, col, tile, width, gu_m, gs_m, gs_g, g_m,
    SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Of rows m before stop and columns of one tile: the gradients to gate and to up and the product, in float32 and
    with the rows' weights, and what these columns add to the weights' gradient."""
    live = m < stop
    row = m.to(tl.int64)
    mask = live[:, None] & (col < width)[None, :]
    place = gate_up + (row * gu_m)[:, None] + col[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(grad + (row * g_m)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        of_row = gu_scale + row * gs_m + tl.cast(tile, tl.int64) * gs_g
        gate = gate * tl.load(of_row, mask=live, other=0.0)[:, None]
        up = up * tl.load(of_row + tl.cast(width // 128, tl.int64) * gs_g, mask=live, other=0.0)[:, None]
    # An exponential and a root that flush what is subnormal take a third of the instructions of `tl.sigmoid`.
    root = tl.rsqrt(1 + tl.exp2(gate * -1.4426950408889634))
    sigmoid = root * root
    silu = gate * sigmoid
    product = silu * up
    part = tl.sum(d * product, 1)
    if WEIGHTED:
        w = tl.load(weights + row, mask=live, other=0.0).to(tl.float32)[:, None]
        d = d * w
        product = product * w
    slope = sigmoid + silu * (1 - sigmoid)
    return d * up * slope, d * silu, product, part


@triton.jit
def swiglu_gradient(
    gate_up, gu_scale, grad, weights, grad_gate_up, out, share, rows, width, gu_m, gs_m, gs_g, g_m,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """BLOCK rows, all columns in pieces of 128; gate and up lie side by side, 128 divides width where SCALED."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = m < rows
    row = m.to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    for piece in range(tl.cdiv(width, 128)):
        col = piece * 128 + tl.arange(0, 128)
        gate, up, product, part = swiglu_part(gate_up, gu_scale, grad, weights, m, rows, col, piece, width, gu_m,
                                              gs_m, gs_g, g_m, SCALED, WEIGHTED)  # fmt: skip
        total += part
        mask = live[:, None] & (col < width)[None, :]
        tl.store(out + row[:, None] * width + col[None, :], product.to(dtype), mask=mask)
        here = grad_gate_up + row[:, None] * (2 * width) + col[None, :]
        tl.store(here, gate.to(dtype), mask=mask)
        tl.store(here + width, up.to(dtype), mask=mask)
    tl.store(share + row, total, mask=live)


@triton.jit
def swiglu_gradient_rows(
    gate_up, gu_scale, grad, weights, share, codes, scale, rows, width, gu_m, gs_m, gs_g, g_m, scale_m, scale_g, floor,
    BLOCK: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """1 x 128 tiles of the gradients to gate and to up, side by side. share: [width / 128, rows], parts of the sum."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.program_id(1).to(tl.int64)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    gate, up, _, part = swiglu_part(gate_up, gu_scale, grad, weights, m, rows, col, piece, width, gu_m, gs_m, gs_g,
                                    g_m, SCALED, WEIGHTED)  # fmt: skip
    if WEIGHTED:
        tl.store(share + piece * rows + m, part, mask=m < rows)
    beside = scale + piece * scale_g
    store_rows(gate, codes, beside, m, rows, col, width, 2 * width, scale_m, floor, POWER)
    beside += tl.cast(width // 128, tl.int64) * scale_g
    store_rows(up, codes + width, beside, m, rows, col, width, 2 * width, scale_m, floor, POWER)


@triton.jit
def swiglu_gradient_columns(
    gate_up, gu_scale, grad, weights, codes, scale, product, product_scale, tiles,
    rows, width, gu_m, gs_m, gs_g, g_m, codes_d, scale_d, scale_g, ps_d, ps_g, floor,
    BLOCK: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """128 x 1 tiles, transposed, of the gradients to gate and to up, one below the other, and of the product."""
    start, stop = bounds(tiles, rows, GROUPED)
    if stop < 0:
        return
    m = start + 4 * tl.arange(0, 32)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    near = tl.max_contiguous(col, 4)
    tile = tl.program_id(1) * BLOCK // 128
    gate_a, up_a, out_a, _ = swiglu_part(gate_up, gu_scale, grad, weights, m, stop, near, tile, width, gu_m, gs_m,
                                         gs_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    gate_b, up_b, out_b, _ = swiglu_part(gate_up, gu_scale, grad, weights, m + 1, stop, near, tile, width, gu_m, gs_m,
                                         gs_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    gate_c, up_c, out_c, _ = swiglu_part(gate_up, gu_scale, grad, weights, m + 2, stop, near, tile, width, gu_m, gs_m,
                                         gs_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    gate_d, up_d, out_d, _ = swiglu_part(gate_up, gu_scale, grad, weights, m + 3, stop, near, tile, width, gu_m, gs_m,
                                         gs_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    store_columns(out_a, out_b, out_c, out_d, product, product_scale, rows, col, width, codes_d, ps_d, ps_g, floor,
                  POWER, GROUPED)  # fmt: skip
    store_columns(gate_a, gate_b, gate_c, gate_d, codes, scale, rows, col, width, codes_d, scale_d, scale_g, floor,
                  POWER, GROUPED)  # fmt: skip
    below = tl.cast(width, tl.int64)
    store_columns(up_a, up_b, up_c, up_d, codes + below * codes_d, scale + below * scale_d, rows, col, width, codes_d,
                  scale_d, scale_g, floor, POWER, GROUPED)  # fmt: skip
