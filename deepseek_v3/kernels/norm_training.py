"""RMSNorm of training: one launch forward, with the residual's sum where there is one, and one backward, with the
gradient that reaches the residual stream beside the norm. Nothing but the input and a number a row is kept.

D hidden. Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.2.3.
"""

import torch

from . import dispatch
from .norm import OPERATION, TRITON_DTYPES
from .reference import norm_training as reference


def _is_triton(backend: str, *tensors: torch.Tensor | None) -> bool:
    first = tensors[0]
    assert first is not None
    reasons: dispatch.Reasons = {"triton": dispatch.triton_reason(first.device), "torch": None}
    odd = [str(x.dtype) for x in tensors if x is not None and x.dtype not in TRITON_DTYPES]
    reasons["triton"] = reasons["triton"] or (", ".join(odd) or None)
    return dispatch.choose(OPERATION, reasons, backend, first.device) == "triton"


def _rows(x: torch.Tensor) -> torch.Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _sum_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _kept_fake(x, residual, weight, eps, backend):
    dtype = _sum_dtype(x, residual)
    out = x.new_empty(x.shape, dtype=torch.promote_types(dtype, weight.dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = x.new_empty((0,) if residual is None else x.shape, dtype=dtype)
    return out, total, x.new_empty(x.shape[:-1], dtype=wide)


@dispatch.define(
    "rms_norm_kept(Tensor x, Tensor? residual, Tensor weight, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _kept_fake,
)
def _kept(x, residual, weight, eps, backend):
    if _is_triton(backend, x, residual, weight):
        from .triton.launch_norm_training import rms_norm_kept as launch

        dtype = torch.promote_types(_sum_dtype(x, residual), weight.dtype)
        out, total, rstd = launch(_rows(x), None if residual is None else _rows(residual), weight, eps, dtype)
        out, total, rstd = out.view(x.shape), total.view(x.shape), rstd.view(x.shape[:-1])
    else:
        out, total, rstd = reference.rms_norm_kept(x, residual, weight, eps)
    # An operation's results must not alias what it is given: without a residual there is no sum.
    return out, total if residual is not None else x.new_empty(0), rstd


@dispatch.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? through, str backend)"
    " -> (Tensor, Tensor)",
    lambda grad, x, weight, rstd, through, backend: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
    ),
)
def _backward(grad, x, weight, rstd, through, backend):
    if not _is_triton(backend, grad, x, weight, through) or not x.numel():
        return reference.rms_norm_backward(grad, x, weight, rstd, through)
    from .triton.launch_norm_training import rms_norm_backward as launch

    flat = None if through is None else _rows(through)
    dx, dw = launch(_rows(grad), _rows(x), weight, rstd.reshape(-1), flat)
    return dx.view(x.shape), dw


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, backend):
        out, total, rstd = dispatch.ops.rms_norm_kept(x, residual, weight, eps, backend)
        total = x if residual is None else total
        ctx.save_for_backward(total, weight, rstd)
        ctx.dtypes, ctx.backend = (x.dtype, None if residual is None else residual.dtype), backend
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, through):
        total, weight, rstd = ctx.saved_tensors
        if grad is None:
            dx, dw = through, None
        else:
            dx, dw = dispatch.ops.rms_norm_backward(grad, total, weight, rstd, through, ctx.backend)
        if dx is None:
            return None, None, None, None, None
        to_x, to_residual = (None if dtype is None else dx.to(dtype) for dtype in ctx.dtypes)
        return to_x, to_residual, dw, None, None


def joined_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm`` of ``x + residual`` and the sum, differentiable, the sum's own gradient joined in the one pass.

    Args:
        x: [..., D], bfloat16, float16, float32 (float64 on the torch path).
        residual: of x's shape, any of these dtypes; None: the sum is x itself.
        weight: [D], any of these dtypes. eps: added to the mean square.
        backend: "auto", "triton" or "torch".

    Returns:
        The norm [..., D], of the dtype of their product with the weight, and the sum, of the dtype of the sum.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"x {tuple(x.shape)} needs a weight [{x.shape[-1]}] and a residual of its shape")
    return _Norm.apply(x, residual, weight, eps, backend)
