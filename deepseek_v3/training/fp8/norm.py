"""RMSNorm that keeps its input alone for the backward (DeepSeek-V3 report, section 3.2.3)."""

from typing import Any

import torch

from ...modeling_deepseek_v3.layers import DeepseekV3RMSNorm
from .state import FP8Module


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.is_cuda and x.dtype == weight.dtype:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    value = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * value.to(x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normed(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            out = _normed(x, weight, ctx.eps)
        dx, dw = torch.autograd.grad(out, (x, weight), grad)
        return dx, dw if ctx.needs_input_grad[1] else None, None


class FP8TrainingRMSNorm(FP8Module, DeepseekV3RMSNorm):
    """RMSNorm, computed again in the backward where the recipe says so; never in FP8."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[.., D] to [.., D]."""
        if not self.training:
            return super().forward(hidden_states)
        return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)
