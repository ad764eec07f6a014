"""SwiGLU's product and its gradient, each in one pass over what it reads and writes."""

import torch
import triton
import triton.language as tl

from .launching import Launcher, cdiv, next_power_of_2


@triton.jit
def swiglu_rows(gate, up, grad, out, width, gate_m, up_m, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    """out[row] = silu(gate[row]) * up[row], a stretch of BLOCK columns; BACKWARD: of the gradient grad [M, width] that
    to gate and up, out [M, 2 width]."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    wide = tl.load(gate + row * gate_m + col, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_m + col, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(wide)
    if BACKWARD:
        given = tl.load(grad + row * width + col, mask=inside, other=0.0).to(tl.float32)
        place = out + row * 2 * width + col
        to_gate = given * other * share * (1 + wide * (1 - share))
        tl.store(place, to_gate.to(out.dtype.element_ty), mask=inside)
        tl.store(place + width, (given * wide * share).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * width + col, (wide * share * other).to(out.dtype.element_ty), mask=inside)


_swiglu = Launcher(swiglu_rows)


def swiglu(gate, up, grad):
    """See ``deepseek_v3.kernels.swiglu``; gate and up [M, F] with dense rows. With ``grad`` [M, F], contiguous, the
    gradient [M, 2F]."""
    rows, width = gate.shape
    out = torch.empty(rows, width if grad is None else 2 * width, dtype=gate.dtype, device=gate.device)
    if out.numel():
        block = min(2048 if grad is None else 1024, next_power_of_2(width))
        _swiglu(
            (rows, cdiv(width, block), 1), (gate, up, grad, out), (width, gate.stride(0), up.stride(0)),
            BLOCK=block, BACKWARD=grad is not None, num_warps=4,
        )  # fmt: skip
    return out
