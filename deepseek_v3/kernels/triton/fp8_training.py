"""Kernels of FP8 training between its products: re-tiling of kept codes, SwiGLU's backward from kept codes."""

import triton
import triton.language as tl

from .quantize import encoded, largest, rows_of, scale_of


@triton.jit
def retile_columns(
    x, x_scale, source, codes, scale, offsets, rows, width, experts, x_m, xs_m, xs_g, codes_d, scale_d, scale_g,
    floor,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, POWER: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """128 x 1 tiles, transposed, of rows of x (times their 1 x 128 scales): row m is source[m] where GATHER."""
    group = tl.program_id(0)
    start = group * 128
    stop = tl.minimum(start + 128, rows)
    if GROUPED:
        start, stop = rows_of(offsets, group, experts, 128, BLOCK_E)
        if stop < 0:
            return
    lane = tl.arange(0, 128)
    live = start + lane < stop
    m = (start + lane).to(tl.int64)
    if GATHER:
        m = tl.load(source + m, mask=live, other=0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = live[:, None] & (col < width)[None, :]
    value = tl.load(x + m[:, None] * x_m + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        # BLOCK divides 128: these columns share one scale a row.
        of_row = x_scale + m * xs_m + (tl.program_id(1) * BLOCK // 128).to(tl.int64) * xs_g
        value = value * tl.load(of_row, mask=live, other=0.0)[:, None]
    s = scale_of(largest(value, 0), floor, POWER)
    tl.store(scale + col.to(tl.int64) * scale_d + group.to(tl.int64) * scale_g, s, mask=col < width)
    last = group * 128 + lane
    room = (last < rows) | GROUPED
    place = col.to(tl.int64)[None, :] * codes_d + last[:, None]
    tl.store(codes + place, encoded(value, s[None, :]), mask=room[:, None] & (col < width)[None, :])


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
