"""Steps of FP8 training between its products, in plain torch: re-tiling of kept codes, SwiGLU's backward.

P rows sorted by expert, M rows, D columns, F expert width.
"""

import torch

from .fp8 import by_group, quantize_grouped_transposed, widen
from .quantize import quantize_activation


def retile(x, scale, rows, offsets, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.retile``."""
    values = x if scale is None else widen(x, scale)
    if rows is not None:
        values = values[rows.long()]
    if offsets is not None:
        return quantize_grouped_transposed(values, offsets, scale_fmt, amax_floor)
    codes, scale = quantize_activation(values.t(), 128, scale_fmt, amax_floor)
    return codes.contiguous(), by_group(scale)


def quantize_both(x, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.quantize_both``."""
    codes, scale = quantize_activation(x, 128, scale_fmt, amax_floor)
    return codes.contiguous(), by_group(scale), *retile(x, None, None, None, scale_fmt, amax_floor)


def swiglu_forward_codes(gate_up, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.swiglu_forward_codes``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    codes, scale = quantize_activation((gate * gate.sigmoid() * up).to(gate_up.dtype), 128, scale_fmt, amax_floor)
    kept, kept_scale = quantize_activation(gate_up, 128, scale_fmt, amax_floor)
    return codes.contiguous(), by_group(scale), kept.contiguous(), by_group(kept_scale)


def swiglu_backward(gate_up, scale, grad, weights):
    """See ``deepseek_v3.kernels.swiglu_backward``."""
    gate, up = (gate_up.float() if scale is None else widen(gate_up, scale)).chunk(2, dim=-1)
    sigmoid, wide = gate.sigmoid(), grad.float()
    silu = gate * sigmoid
    out = silu * up
    share = (wide * out).sum(-1)
    if weights is not None:
        wide, out = wide * weights[:, None], out * weights[:, None]
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    grad_gate_up = torch.cat((wide * up * slope, wide * silu), dim=-1)
    return grad_gate_up.to(grad.dtype), out.to(grad.dtype), share


def swiglu_backward_codes(gate_up, scale, grad, weights, offsets, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.swiglu_backward_codes``."""
    grad_gate_up, out, share = swiglu_backward(gate_up, scale, grad.float(), weights)
    codes, along = quantize_activation(grad_gate_up, 128, scale_fmt, amax_floor)
    down = retile(grad_gate_up, None, None, offsets, scale_fmt, amax_floor)
    product = retile(out, None, None, offsets, scale_fmt, amax_floor)
    return codes.contiguous(), by_group(along), *down, *product, share
