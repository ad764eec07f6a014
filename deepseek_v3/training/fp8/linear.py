"""Linear layers and the SwiGLU MLP with all three products in FP8 (DeepSeek-V3 report, section 3.3.1).

M rows, K input features, N output features, F width of the MLP.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ...kernels import (
    fp8_gemm,
    quantize_swiglu,
    retile,
    swiglu_backward,
    swiglu_backward_codes,
    swiglu_forward_codes,
    unpack_e5m6,
)
from ...modeling_deepseek_v3.layers import DeepseekV3MLP
from .quantise import Pair, input_codes
from .state import FP8Module, FP8State, result_dtype
from .weights import Codes


class Packed(NamedTuple):
    """The input of a linear layer [M, K] in 12 bits a number."""

    high: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    width: int
    dtype: torch.dtype

    def values(self) -> torch.Tensor:
        """[M, K] of the dtype that was packed."""
        return unpack_e5m6(self.high, self.low, self.scale, self.width, dtype=self.dtype)


def input_gradient(grad: Pair, weight: Codes, dtype: torch.dtype) -> torch.Tensor:
    """Dgrad: codes and scales of [M, N] to [M, K]."""
    assert weight.codes_t is not None and weight.scale_t is not None
    return fp8_gemm(*grad, weight.codes_t, weight.scale_t, out_dtype=dtype)


def weight_gradient(
    grad: Pair, x: tuple[torch.Tensor, torch.Tensor | None], state: FP8State, dtype: torch.dtype
) -> torch.Tensor:
    """Wgrad: codes and scales of the gradient in 128 x 1 tiles [N, M], and the input [M, K] as codes or values:
    [N, K]."""
    return fp8_gemm(*grad, *retile(*x, scale_fmt=state.recipe.scale_fmt), out_dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        module: "FP8TrainingLinear",
        packed: Packed | None,
    ) -> torch.Tensor:
        ctx.kept = module.fp8.weight(weight, transposed=ctx.needs_input_grad[0])
        ctx.state, ctx.dtype, ctx.weight, ctx.packed = module.fp8, x.dtype, weight, None
        if packed is not None:
            ctx.save_for_backward(*packed[:3])
            ctx.packed = packed[3:]
        elif ctx.needs_input_grad[1]:
            ctx.save_for_backward(codes, scale)
        out = fp8_gemm(codes, scale, ctx.kept.codes, ctx.kept.scale, out_dtype=result_dtype(x))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dx = dw = None
        along, down = ctx.state.gradient(grad, *ctx.needs_input_grad[:2])
        if along is not None:
            dx = input_gradient(along, ctx.kept, grad.dtype).view(*grad.shape[:-1], -1).to(ctx.dtype)
        if down is not None:
            dtype = ctx.state.recipe.gradient_dtype(ctx.weight)
            saved = ctx.saved_tensors
            x = saved if ctx.packed is None else (Packed(*saved, *ctx.packed).values(), None)
            dw = weight_gradient(down, x, ctx.state, dtype).to(ctx.weight.dtype)
        return dx, dw, None, None, None, None


class FP8TrainingLinear(FP8Module, nn.Linear):
    """A linear layer whose three products run in FP8 in `train()`; in `eval()` the `nn.Linear` that it was."""

    # Read by the model: the absorbed form of attention may use the weight as it is.
    lends_weight = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., K] to [.., N], of the dtype that `nn.Linear` would give."""
        if not self.in_fp8(x):
            return super().forward(x)
        return self.with_packed(x, None)

    def with_packed(self, x: torch.Tensor, packed: Packed | None) -> torch.Tensor:
        """The forward of `train()`; for the weight gradient x is kept as `packed`, where given, instead of in FP8."""
        codes = input_codes(x, self.fp8.recipe.scale_fmt, self.fp8.statistics)
        out = _Linear.apply(x, self.weight, *codes, self, packed)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def swiglu_codes(gate_up: torch.Tensor, state: FP8State, keep: bool) -> tuple[Pair, Any]:
    """Codes and scales of silu(gate) * up [M, F] from gate and up side by side [M, 2F]; where `keep`, what the
    backward keeps of these, by the recipe, as codes and scales or as they are and None."""
    fmt = state.recipe.scale_fmt
    gate, up = gate_up.chunk(2, dim=-1)
    kept: Any = gate_up, None
    if keep and state.recipe.swiglu_inputs == "fp8":
        product, kept = swiglu_forward_codes(gate_up, scale_fmt=fmt)
    else:
        product = quantize_swiglu(gate, up, scale_fmt=fmt)
    if state.statistics.active:
        state.statistics.count("activation", nn.functional.silu(gate) * up, product[0])
    return product, kept


def swiglu_gradients(
    gate_up: torch.Tensor,
    scale: torch.Tensor | None,
    grad: torch.Tensor,
    state: FP8State,
    weights: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[Pair, Pair, Pair, torch.Tensor]:
    """See `swiglu_backward_codes`: the gradient to gate and up for Dgrad and for Wgrad, the product for Wgrad."""
    fmt = state.recipe.scale_fmt
    results = swiglu_backward_codes(gate_up, scale, grad, weights, offsets=offsets, scale_fmt=fmt)
    if state.statistics.active:
        state.statistics.count("gradient", swiglu_backward(gate_up, scale, grad, weights)[0], results[0][0])
    return results


class _MLP(torch.autograd.Function):
    """down(silu(gate x) * up x) with one product for gate and up; keeps codes of x and of gate and up alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        module: "FP8TrainingMLP",
    ) -> torch.Tensor:
        state, dtype = module.fp8, result_dtype(x)
        wanted = any(ctx.needs_input_grad[:4])
        first = state.weight(gate, up, transposed=ctx.needs_input_grad[0])
        second = state.weight(down, transposed=wanted)
        gate_up = fp8_gemm(codes, scale, first.codes, first.scale, out_dtype=dtype)  # [M, 2F]
        product, kept = swiglu_codes(gate_up, state, wanted)
        out = fp8_gemm(*product, second.codes, second.scale, out_dtype=dtype)
        ctx.state, ctx.first, ctx.second, ctx.weights, ctx.dtype = state, first, second, (gate, up, down), x.dtype
        if wanted:
            ctx.save_for_backward(codes, scale, *kept)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        codes, scale, gate_up, gate_up_scale = ctx.saved_tensors
        state, (gate, _, down), needs = ctx.state, ctx.weights, ctx.needs_input_grad
        given, across = state.gradient(grad, True, needs[3])
        inner = input_gradient(given, ctx.second, grad.dtype)
        result: list[Any] = [None] * 7
        along, turned, product, _ = swiglu_gradients(gate_up, gate_up_scale, inner, state)
        if needs[3]:
            dtype = state.recipe.gradient_dtype(down)
            result[3] = fp8_gemm(across[0], across[1], *product, out_dtype=dtype).to(down.dtype)
        if needs[0]:
            result[0] = input_gradient(along, ctx.first, grad.dtype).view(*grad.shape[:-1], -1).to(ctx.dtype)
        if needs[1] or needs[2]:
            both = weight_gradient(turned, (codes, scale), state, state.recipe.gradient_dtype(gate))
            halves = both.to(gate.dtype).chunk(2)
            result[1:3] = [half if needed else None for half, needed in zip(halves, needs[1:3], strict=True)]
        return tuple(result)


class FP8TrainingMLP(FP8Module, DeepseekV3MLP):
    """The SwiGLU MLP as one node; where something wraps one of its linears, layer by layer."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[.., D] to [.., D]."""
        parts = (self.gate_proj, self.up_proj, self.down_proj)
        plain = all(type(part) is FP8TrainingLinear and not is_hooked(part) for part in parts)
        if not plain or not self.in_fp8(hidden_states):
            return super().forward(hidden_states)
        codes = input_codes(hidden_states, self.fp8.recipe.scale_fmt, self.fp8.statistics)
        return _MLP.apply(hidden_states, *(part.weight for part in parts), *codes, self)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "_hf_hook") or hasattr(module, "parametrizations")
