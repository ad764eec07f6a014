"""Kernels of FP8 training between its products: re-tiling of kept codes, SwiGLU's backward from kept codes."""

import triton
import triton.language as tl

from .quantize import encoded, largest, magnitude, rows_of, scale_of


@triton.jit
def taken(x, x_scale, source, m, stop, col, width, x_m, xs_m, xs_g, SCALED: tl.constexpr, GATHER: tl.constexpr):
    """float32 values of rows m before stop, 0 elsewhere; SCALED: codes, whose columns share one scale a row."""
    live = m < stop
    row = m.to(tl.int64)
    if GATHER:
        row = tl.load(source + row, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (col < width)[None, :]
    value = tl.load(x + row[:, None] * x_m + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        value = value * tl.load(x_scale + row * xs_m + xs_g, mask=live, other=0.0)[:, None]
    return value


@triton.jit
def store_rows(value, codes, scale, m, rows, col, width, codes_m, scale_m, floor, POWER: tl.constexpr):
    """1 x 128 tiles: the columns of value are one."""
    value = value.to(tl.float32)
    s = scale_of(largest(value, 1), floor, POWER)
    tl.store(scale + m.to(tl.int64) * scale_m, s, mask=m < rows)
    mask = (m < rows)[:, None] & (col < width)[None, :]
    tl.store(codes + m.to(tl.int64)[:, None] * codes_m + col[None, :], encoded(value, s[:, None]), mask=mask)


@triton.jit
def bits(value, scale):
    """Codes of value / scale for each column, as integers."""
    return encoded(value, scale[None, :]).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def store_columns(
    a, b, c, d, codes, scale, group, rows, col, width, codes_d, scale_d, scale_g, floor,
    POWER: tl.constexpr, PACKED: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """The 128 x 1 tiles of a group, transposed, of its rows 4 i (a) to 4 i + 3 (d). PACKED: four codes at a time,
    which a quarter of the exchanges between threads transposes."""
    a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    most = tl.maximum(tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d)))
    s = scale_of(tl.max(most, 0), floor, POWER)
    tl.store(scale + col.to(tl.int64) * scale_d + group.to(tl.int64) * scale_g, s, mask=col < width)
    last = group * 128 + 4 * tl.arange(0, 32)
    place = col.to(tl.int64)[None, :] * codes_d + last[:, None]
    inside = (col < width)[None, :]
    if PACKED:
        word = bits(a, s) | (bits(b, s) << 8) | (bits(c, s) << 16) | (bits(d, s) << 24)
        words = codes.to(tl.pointer_type(tl.int32))
        tl.store(words + place // 4, word, mask=inside & ((last < rows) | GROUPED)[:, None])
    else:
        tl.store(codes + place, encoded(a, s[None, :]), mask=inside & (last < rows)[:, None])
        tl.store(codes + place + 1, encoded(b, s[None, :]), mask=inside & (last + 1 < rows)[:, None])
        tl.store(codes + place + 2, encoded(c, s[None, :]), mask=inside & (last + 2 < rows)[:, None])
        tl.store(codes + place + 3, encoded(d, s[None, :]), mask=inside & (last + 3 < rows)[:, None])


@triton.jit
def store_both(
    a, b, c, d, codes, scale, row_codes, row_scale, group, m, stop, rows, col, width,
    codes_d, scale_d, scale_g, rc_m, rs_m, floor, POWER: tl.constexpr, PACKED: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """A tile's codes along rows and down columns."""
    store_rows(a, row_codes, row_scale, m, stop, col, width, rc_m, rs_m, floor, POWER)
    store_rows(b, row_codes, row_scale, m + 1, stop, col, width, rc_m, rs_m, floor, POWER)
    store_rows(c, row_codes, row_scale, m + 2, stop, col, width, rc_m, rs_m, floor, POWER)
    store_rows(d, row_codes, row_scale, m + 3, stop, col, width, rc_m, rs_m, floor, POWER)
    store_columns(a, b, c, d, codes, scale, group, rows, col, width, codes_d, scale_d, scale_g, floor, POWER, PACKED,
                  GROUPED)  # fmt: skip


@triton.jit
def retile_columns(
    x, x_scale, source, codes, scale, row_codes, row_scale, offsets,
    rows, width, experts, x_m, xs_m, xs_g, codes_d, scale_d, scale_g, rc_m, rs_m, rs_g, floor,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr,
    GROUPED: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """128 x 1 tiles, transposed, of rows of x (times their 1 x 128 scales): row m is source[m] where GATHER. ROWS:
    and 1 x 128 tiles as they lie, of one read."""
    group = tl.program_id(0)
    start = group * 128
    stop = tl.minimum(start + 128, rows)
    if GROUPED:
        start, stop = rows_of(offsets, group, experts, 128, BLOCK_E)
        if stop < 0:
            return
    m = start + 4 * tl.arange(0, 32)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # BLOCK divides 128: these columns share one scale a row.
    tile = (tl.program_id(1) * BLOCK // 128).to(tl.int64)
    a = taken(x, x_scale, source, m, stop, col, width, x_m, xs_m, tile * xs_g, SCALED, GATHER)
    b = taken(x, x_scale, source, m + 1, stop, col, width, x_m, xs_m, tile * xs_g, SCALED, GATHER)
    c = taken(x, x_scale, source, m + 2, stop, col, width, x_m, xs_m, tile * xs_g, SCALED, GATHER)
    d = taken(x, x_scale, source, m + 3, stop, col, width, x_m, xs_m, tile * xs_g, SCALED, GATHER)
    if ROWS:
        store_both(a, b, c, d, codes, scale, row_codes, row_scale + tile * rs_g, group, m, stop, rows, col, width,
                   codes_d, scale_d, scale_g, rc_m, rs_m, floor, POWER, PACKED, GROUPED)  # fmt: skip
    else:
        store_columns(a, b, c, d, codes, scale, group, rows, col, width, codes_d, scale_d, scale_g, floor, POWER,
                      PACKED, GROUPED)  # fmt: skip


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
def swiglu_gradient(
    gate_up, gu_scale, grad, weights, grad_gate_up, out, share, rows, width, gu_m, gs_m, gs_g, g_m,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """BLOCK rows, all columns in pieces of 128; gate and up lie side by side, 128 divides width where SCALED."""
    m = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = m < rows
    total = tl.zeros([BLOCK], tl.float32)
    if WEIGHTED:
        w = tl.load(weights + m, mask=live, other=0.0).to(tl.float32)
    for piece in range(tl.cdiv(width, 128)):
        col = piece * 128 + tl.arange(0, 128)
        mask = live[:, None] & (col < width)[None, :]
        place = gate_up + m[:, None] * gu_m + col[None, :]
        gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            of_row = gu_scale + m * gs_m + tl.cast(piece, tl.int64) * gs_g
            gate = gate * tl.load(of_row, mask=live, other=0.0)[:, None]
            up = up * tl.load(of_row + tl.cast(width // 128, tl.int64) * gs_g, mask=live, other=0.0)[:, None]
        d = tl.load(grad + m[:, None] * g_m + col[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        total += tl.sum(d * product, 1)
        if WEIGHTED:
            d = d * w[:, None]
            product = product * w[:, None]
        type_out = out.dtype.element_ty
        tl.store(out + m[:, None] * width + col[None, :], product.to(type_out), mask=mask)
        here = grad_gate_up + m[:, None] * (2 * width) + col[None, :]
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(here, (d * up * slope).to(type_out), mask=mask)
        tl.store(here + width, (d * silu).to(type_out), mask=mask)
    tl.store(share + m, total, mask=live)


@triton.jit
def widened(x, scale, m, live, col, width, x_m, s_m, s_g, SCALED: tl.constexpr):
    """float32 values of whole 128-column tiles, the columns one tile; SCALED: codes and their tile's scales."""
    value = tl.load(x + m[:, None] * x_m + col[None, :], mask=live[:, None] & (col < width)[None, :], other=0.0)
    if SCALED:
        return value.to(tl.float32) * tl.load(scale + m * s_m + s_g, mask=live, other=0.0)[:, None]
    return value.to(tl.float32)


@triton.jit
def swiglu_quarter(
    gate_up, gu_scale, grad, weights, share, m, stop, col, width, gu_m, gs_m, tile_g, half_g, g_m,
    SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Of rows m the gradients to gate and to up and the product, in the gradient's dtype; to share the weights'."""
    live = m < stop
    m = m.to(tl.int64)
    gate = widened(gate_up, gu_scale, m, live, col, width, gu_m, gs_m, tile_g, SCALED)
    up = widened(gate_up + width, gu_scale, m, live, col, width, gu_m, gs_m, tile_g + half_g, SCALED)
    mask = live[:, None] & (col < width)[None, :]
    d = tl.load(grad + m[:, None] * g_m + col[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    product = silu * up
    if WEIGHTED:
        tl.store(share + m, tl.sum(d * product, 1), mask=live)
        w = tl.load(weights + m, mask=live, other=0.0).to(tl.float32)[:, None]
        d = d * w
        product = product * w
    dtype: tl.constexpr = grad.dtype.element_ty
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return (d * up * slope).to(dtype), (d * silu).to(dtype), product.to(dtype)


@triton.jit
def swiglu_gradient_codes(
    gate_up, gu_scale, grad, weights, share, codes, scale, row_codes, row_scale, product, product_scale, offsets,
    rows, width, experts, gu_m, gs_m, gs_g, g_m, codes_d, scale_d, scale_g, rc_m, rs_m, rs_g, ps_d, ps_g, floor,
    BLOCK_E: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
    GROUPED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A 128 x 128 tile of all that SwiGLU's backward gives. share: [width / 128, rows], a part of the sum each."""
    group = tl.program_id(0)
    piece = tl.program_id(1)
    start = group * 128
    stop = tl.minimum(start + 128, rows)
    if GROUPED:
        start, stop = rows_of(offsets, group, experts, 128, BLOCK_E)
        if stop < 0:
            return
    m = start + 4 * tl.arange(0, 32)
    col = piece * 128 + tl.arange(0, 128)
    tile_g = piece.to(tl.int64) * gs_g
    half = width // 128
    half_g = tl.cast(half, tl.int64) * gs_g
    sums = share + piece.to(tl.int64) * rows
    gate_a, up_a, out_a = swiglu_quarter(gate_up, gu_scale, grad, weights, sums, m, stop, col, width, gu_m, gs_m,
                                         tile_g, half_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    gate_b, up_b, out_b = swiglu_quarter(gate_up, gu_scale, grad, weights, sums, m + 1, stop, col, width, gu_m, gs_m,
                                         tile_g, half_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    gate_c, up_c, out_c = swiglu_quarter(gate_up, gu_scale, grad, weights, sums, m + 2, stop, col, width, gu_m, gs_m,
                                         tile_g, half_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    gate_d, up_d, out_d = swiglu_quarter(gate_up, gu_scale, grad, weights, sums, m + 3, stop, col, width, gu_m, gs_m,
                                         tile_g, half_g, g_m, SCALED, WEIGHTED)  # fmt: skip
    store_columns(out_a, out_b, out_c, out_d, product, product_scale, group, rows, col, width, codes_d, ps_d, ps_g,
                  floor, POWER, PACKED, GROUPED)  # fmt: skip
    # The gradients to gate and up lie side by side.
    beside = row_scale + piece.to(tl.int64) * rs_g
    store_both(gate_a, gate_b, gate_c, gate_d, codes, scale, row_codes, beside, group, m, stop, rows, col, width,
               codes_d, scale_d, scale_g, rc_m, rs_m, floor, POWER, PACKED, GROUPED)  # fmt: skip
    below = tl.cast(width, tl.int64)
    store_both(up_a, up_b, up_c, up_d, codes + below * codes_d, scale + below * scale_d, row_codes + width,
               beside + tl.cast(half, tl.int64) * rs_g, group, m, stop, rows, col, width,
               codes_d, scale_d, scale_g, rc_m, rs_m, floor, POWER, PACKED, GROUPED)  # fmt: skip
