"""SwiGLU's product in plain torch. F width."""

import torch
import torch.nn.functional as F


def _wide(*tensors):
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def swiglu(gate, up):
    """See ``deepseek_v3.kernels.swiglu``."""
    wide, other = _wide(gate, up)
    return (F.silu(wide) * other).to(gate.dtype)


def swiglu_backward(gate, up, grad):
    """Gradient [..., F] of the result to that of gate and up side by side [..., 2F]."""
    wide, other, grad = _wide(gate, up, grad)
    share = wide.sigmoid()
    to_gate = grad * other * share * (1 + wide * (1 - share))
    return torch.cat((to_gate, grad * wide * share), dim=-1).to(gate.dtype)
