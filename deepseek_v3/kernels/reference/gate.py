"""SwiGLU's gate in plain torch. P rows, F width."""

import torch
import torch.nn.functional as F


def _halves(both):
    return both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, dim=-1)


def silu_gate(both):
    """See ``deepseek_v3.kernels.silu_gate``."""
    gate, up = _halves(both)
    return (F.silu(gate) * up).to(both.dtype)


def silu_gate_backward(both, grad):
    """Gradient [P, F] of the result to that of gate and up [P, 2F]."""
    gate, up = _halves(both)
    share, grad = gate.sigmoid(), grad.to(gate.dtype)
    to_gate = grad * up * share * (1 + gate * (1 - share))
    return torch.cat((to_gate, grad * gate * share), dim=-1).to(both.dtype)
