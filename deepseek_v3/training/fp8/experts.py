"""Routed experts with all products in FP8, from the tokens to the weighted sum, as one node of the graph.

What is kept is the codes of the tokens, once and not once an expert, and those of gate and up. The experts' outputs
are not kept: the gradient of a router weight is the inner product of the gradient that reaches an expert's SwiGLU
with that SwiGLU's output, which is the same number as with the expert's output.

T tokens, K experts a token, P = T * K pairs sorted by expert, E experts, D hidden, F expert width.
"""

from typing import Any

import torch

from ...kernels import combine_pairs, grouped_fp8_gemm, grouped_fp8_wgrad, retile, sort_pairs
from ...modeling_deepseek_v3.moe import DeepseekV3Experts, DeepseekV3MoE
from ...quantization.adapted import Factors
from .linear import swiglu_codes, swiglu_gradients
from .quantise import Pair, input_codes
from .state import FP8Module, result_dtype


def _gathered(codes: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor) -> Pair:
    """Codes [T, D] and scales [T, D / 128] of each sorted pair's token; the scales stay stored by group."""
    wide = torch.int64 if codes.shape[1] % 8 == 0 else torch.uint8
    picked = codes.view(wide).index_select(0, rows).view(codes.dtype)
    return picked, scale.t().index_select(1, rows).t()


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        module: "FP8TrainingExperts",
    ) -> torch.Tensor:
        state, dtype = module.fp8, result_dtype(hidden)
        wanted = any(ctx.needs_input_grad[:4])
        order, inverse, offsets = sort_pairs(index, gate_up.shape[0])
        rows = order // index.shape[1]  # the token of each sorted pair
        first = state.weight(gate_up, transposed=ctx.needs_input_grad[0])
        second = state.weight(down, transposed=wanted)
        x = _gathered(codes, scale, rows)
        inner = grouped_fp8_gemm(*x, first.codes, first.scale, offsets, out_dtype=dtype)  # [P, 2F]
        product, kept = swiglu_codes(inner, state, wanted)
        y = grouped_fp8_gemm(*product, second.codes, second.scale, offsets, out_dtype=dtype)
        ctx.state, ctx.first, ctx.second, ctx.weights = state, first, second, (gate_up, down)
        ctx.dtype = hidden.dtype
        if wanted:
            ctx.save_for_backward(codes, scale, *kept, weights, order, inverse, offsets)
        return combine_pairs(y, inverse, offsets, weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        codes, scale, inner, inner_scale, weights, order, inverse, offsets = ctx.saved_tensors
        state, (gate_up, down), needs = ctx.state, ctx.weights, ctx.needs_input_grad
        fmt, rows = state.recipe.scale_fmt, order // weights.shape[1]
        # Quantised by token and then handed to the experts, as it would be sent to them.
        sent: Pair = state.gradient(grad, True, False)[0]
        sent = _gathered(*sent, rows)
        reached = grouped_fp8_gemm(*sent, ctx.second.codes_t, ctx.second.scale_t, offsets, out_dtype=grad.dtype)
        row_weights = weights.reshape(-1)[order].float()
        along, turned, product, share = swiglu_gradients(inner, inner_scale, reached, state, row_weights, offsets)
        result: list[Any] = [None] * 8
        if needs[3]:
            # Rows of experts that live elsewhere were never written: they are masked, not multiplied by zero.
            dead = inverse >= offsets[-1]
            result[3] = share[inverse].masked_fill(dead, 0).view_as(weights).to(weights.dtype)
        if needs[2]:
            left = retile(grad, rows=rows, offsets=offsets, scale_fmt=fmt)
            result[2] = _weight_gradient(left, product, offsets, down, state)
        del product, reached, sent
        if needs[1]:
            right = retile(codes, scale, rows=rows, offsets=offsets, scale_fmt=fmt)
            result[1] = _weight_gradient(turned, right, offsets, gate_up, state)
        if needs[0]:
            dx = grouped_fp8_gemm(*along, ctx.first.codes_t, ctx.first.scale_t, offsets, out_dtype=grad.dtype)
            ops = torch.ops.deepseek_v3
            result[0] = ops.combine(dx, inverse, offsets, None, grad.shape[0], "auto").to(ctx.dtype)
        return tuple(result)


def _weight_gradient(left: Pair, right: Pair, offsets: torch.Tensor, weight: torch.Tensor, state: Any) -> torch.Tensor:
    dtype = state.recipe.gradient_dtype(weight)
    return grouped_fp8_wgrad(*left, *right, offsets, dtype=dtype).to(weight.dtype)


class FP8TrainingExperts(FP8Module, DeepseekV3Experts):
    """The fused routed experts in FP8 in `train()`; in `eval()` whatever `experts_implementation` says."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        factors: dict[str, Factors] | None = None,
    ) -> torch.Tensor:
        """Weighted sum of each token's experts: [T, D] with indices and weights [T, K] to [T, D].

        An index of E or more is an expert that lives elsewhere: it adds nothing.
        """
        if factors or not self.in_fp8(hidden_states):
            return super().forward(hidden_states, top_k_index, top_k_weights, factors)
        codes = input_codes(hidden_states, self.fp8.recipe.scale_fmt, self.fp8.statistics)
        # The weights as their module computes them: a wrapper's hooks are on the parameters' way here.
        stacks = (self.gate_up_proj, self.down_proj)
        return _Experts.apply(hidden_states, *stacks, top_k_weights, top_k_index, *codes, self)


class FP8TrainingMoE(FP8Module, DeepseekV3MoE):
    """The experts' node sums a token's gradients in a fixed order on every device, so tokens enter it once."""

    def _routed(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not self.in_fp8(tokens):
            return super()._routed(tokens, indices, weights)
        return self.experts(tokens, indices, weights)
