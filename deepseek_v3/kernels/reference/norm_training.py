"""RMSNorm for training in plain torch: the forward with what its backward keeps, and the backward."""

import torch


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_kept(x, residual, weight, eps):
    """See ``deepseek_v3.kernels.norm_training``."""
    total = x if residual is None else x + residual
    value = _wide(total)
    rstd = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return weight * (value * rstd).to(total.dtype), total, rstd[..., 0]


def rms_norm_backward(grad, total, weight, rstd, through):
    """See ``deepseek_v3.kernels.norm_training``."""
    wide, rstd = _wide(grad), rstd[..., None]
    normed = _wide(total) * rstd
    inner = wide * _wide(weight)
    dx = rstd * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    if through is not None:
        dx = dx + _wide(through)
    dw = (wide * normed).flatten(0, -2).sum(0)
    return dx.to(total.dtype), dw.to(weight.dtype)
