"""Launchers of RMSNorm for training."""

import torch

from ..dispatch import processors
from .launching import next_power_of_2
from .norm_training import rms_norm_gradient, rms_norm_kept_rows


def rms_norm_kept(x, residual, weight, eps, dtype):
    """See ``deepseek_v3.kernels.norm_training``; x and residual [M, D] with dense rows, dtype the output's."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x
    if residual is not None:
        sum_dtype = torch.promote_types(x.dtype, residual.dtype)
        total = torch.empty(rows, width, dtype=sum_dtype, device=x.device)
    if out.numel():
        block = next_power_of_2(width)
        rms_norm_kept_rows[(rows,)](
            x, residual, weight, out, total, rstd, width, eps, x.stride(0),
            0 if residual is None else residual.stride(0), ADD=residual is not None, BLOCK=block,
            num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return out, total, rstd


def rms_norm_backward(grad, total, weight, rstd, through):
    """See ``deepseek_v3.kernels.norm_training``; all [M, D] with dense rows."""
    rows, width = total.shape
    dx = torch.empty(rows, width, dtype=total.dtype, device=total.device)
    block = next_power_of_2(width)
    # Of narrow rows as many programs as keep the memory busy. A wide row takes a multiprocessor's registers: one
    # program, which reads the next rows into shared memory while it works on one, if they fit in a card's smallest.
    wide = block > 2048
    largest = max(x.element_size() for x in (grad, total, through) if x is not None)
    ahead = wide and block * largest <= 1 << 14
    waves = 1 if ahead else max(2, min(16, 16384 // block))
    programs = max(1, min(rows, waves * (processors(total.device.index) if total.is_cuda else 1)))
    partial = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    rms_norm_gradient[(programs,)](
        grad, total, weight, rstd, through, dx, partial, rows, width, grad.stride(0), total.stride(0),
        0 if through is None else through.stride(0), THROUGH=through is not None, BLOCK=block,
        STAGES=3 if ahead else 1, num_warps=16 if ahead else 8 if wide else 4,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)
