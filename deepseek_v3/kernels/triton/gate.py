"""SwiGLU's gate and its gradient, each in one pass over what it reads and writes."""

import torch
import triton
import triton.language as tl

from .launching import Launcher, cdiv

BLOCK = 1024


@triton.jit
def gate_rows(both, grad, out, width, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    """out [P, width] = silu(gate) * up of both [P, 2 width]; BACKWARD: the gradient grad [P, width] to both's."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    gate = tl.load(both + row * 2 * width + col, mask=live, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + col, mask=live, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    if BACKWARD:
        given = tl.load(grad + row * width + col, mask=live, other=0.0).to(tl.float32)
        place = out + row * 2 * width + col
        to_gate = given * up * share * (1 + gate * (1 - share))
        tl.store(place, to_gate.to(out.dtype.element_ty), mask=live)
        tl.store(place + width, (given * gate * share).to(out.dtype.element_ty), mask=live)
    else:
        tl.store(out + row * width + col, (gate * share * up).to(out.dtype.element_ty), mask=live)


_gate = Launcher(gate_rows)


def silu_gate(both, grad):
    """See ``deepseek_v3.kernels.silu_gate``; with ``grad`` its gradient. Everything contiguous."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width if grad is None else 2 * width, dtype=both.dtype, device=both.device)
    if out.numel():
        _gate(
            (rows, cdiv(width, BLOCK), 1), (both, grad, out), (width,),
            BLOCK=BLOCK, BACKWARD=grad is not None, num_warps=4,
        )  # fmt: skip
    return out
