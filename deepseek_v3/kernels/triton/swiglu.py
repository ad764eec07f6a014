"""Kernel of SwiGLU's product."""

import triton
import triton.language as tl


@triton.jit
def swiglu_rows(gate, up, out, width, gate_m, up_m, BLOCK: tl.constexpr):
    """out[row] = silu(gate[row]) * up[row], a stretch of BLOCK columns; the silu is rounded first, as torch does."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    value = tl.load(gate + row * gate_m + col, mask=inside, other=0.0)
    other = tl.load(up + row * up_m + col, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    half = (wide / (1.0 + tl.exp(-wide))).to(value.dtype)
    result = half.to(tl.float32) * other.to(tl.float32)
    tl.store(out + row * width + col, result.to(out.dtype.element_ty), mask=inside)
