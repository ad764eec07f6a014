"""Launcher of SwiGLU's product."""

import torch

from .launching import Launcher, cdiv, next_power_of_2
from .swiglu import swiglu_rows

_swiglu = Launcher(swiglu_rows)


def swiglu(gate, up):
    """See ``deepseek_v3.kernels.swiglu``; both [M, F] with dense rows."""
    rows, width = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        block = min(2048, next_power_of_2(width))
        numbers = (width, gate.stride(0), up.stride(0))
        _swiglu((rows, cdiv(width, block), 1), (gate, up, out), numbers, BLOCK=block, num_warps=4)
    return out
