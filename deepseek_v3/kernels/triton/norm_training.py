"""Kernels of RMSNorm for training. Deterministic: each program sums its rows of the weight's gradient in order."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kept_rows(
    x, residual, weight, out, total, rstd, width, eps, x_m, r_m,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of out = weight * norm(x), or of x + residual, whose sum goes to total; 1 / rms goes to rstd. The
    quotient is rounded before the weight, as the torch module does."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < width
    value = tl.load(x + row * x_m + col, mask=mask, other=0.0)
    rounded: tl.constexpr = total.dtype.element_ty if ADD else x.dtype.element_ty
    if ADD:
        other = tl.load(residual + row * r_m + col, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(rounded)
        tl.store(total + row * width + col, value, mask=mask)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(rstd + row, scale)
    w = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)
    result = w * (value * scale).to(rounded).to(tl.float32)
    tl.store(out + row * width + col, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_gradient(
    grad, x, weight, rstd, through, dx, partial, rows, width, g_m, x_m, t_m,
    THROUGH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th row of dx (plus through), and their sum for the weight: partial [programs, width]."""
    col = tl.arange(0, BLOCK)
    mask = col < width
    w = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        d = tl.load(grad + row * g_m + col, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normed = tl.load(x + row * x_m + col, mask=mask, other=0.0).to(tl.float32) * scale
        if THROUGH:
            past = tl.load(through + row * t_m + col, mask=mask, other=0.0).to(tl.float32)
        total += d * normed
        inner = d * w
        result = scale * (inner - normed * (tl.sum(inner * normed, 0) / width))
        if THROUGH:
            result += past
        tl.store(dx + row * width + col, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0) * width + col, total, mask=mask)
