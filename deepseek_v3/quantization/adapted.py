"""Products with frozen stacks of experts that LoRA adapts: the low-rank factors multiply beside the stack.

Special about it: PEFT's `target_parameters` parametrises a stack with W + s B A for the time of a forward, which makes
a second stack, or over codes a whole change, and keeps it for the gradient. Here the factors are read from PEFT's
wrappers and the experts under them are called with the factors. What multiplies by the stack itself, `Frozen`, is the
stack's own affair: plain, 4-bit or FP8. The factors and what they give stay in float32 until the sum is rounded once,
because low-rank products in BF16 lose as much as all else that is rounded here.

Letters: n tokens, P rows sorted by expert, E experts, D hidden, F expert width, N and K rows and columns of one
expert's matrix, r rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..kernels import combine_pairs, gather_pairs, grouped_gemm, grouped_wgrad, is_silu, sort_pairs, swiglu

# The matrices [e, N, K] in a dtype, of all experts or of some, and the offsets [e + 1] of their rows.
Widen = Callable[[torch.dtype], tuple[torch.Tensor, torch.Tensor]]


class Factors(NamedTuple):
    """The change `scaling * left @ right` to a stack: left [E, N, r], right [E, r, K]."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float


class Frozen(Protocol):
    """A stack [E, N, K] that does not learn, as what its products with rows sorted by expert are."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[P, K] to [P, N], of the rows' dtype."""
        ...

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient [P, N] of a result to that of its rows, [P, K]."""
        ...


class Widened(NamedTuple):
    """A `Frozen` stack that is widened for each product and dropped after it."""

    widen: Widen

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return grouped_gemm(rows, *self.widen(rows.dtype))

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        return grouped_gemm(grad, *self.widen(grad.dtype), transposed=True)


class Stacks(nn.Module):
    """What every module of fused experts is: two stacks and no `weight`, which is said to whoever wants one."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} holds its experts in the stacks gate_up_proj and down_proj, no matrix that "
                "PEFT could start an adapter from (init_lora_weights='pissa', 'olora' and the like). Leave "
                "init_lora_weights at True or 'gaussian', or adapt lora_target_modules(config, 'attention') alone"
            )
        return super().__getattr__(name)


def adapters_on(module: nn.Module, name: str) -> list[Any]:
    """What PEFT's `target_parameters` has put on the parameter `name` for the time of a forward."""
    changed: Any = getattr(module, "parametrizations", {})
    return list(changed[name]) if name in changed else []


def from_under_adapters(module: Any) -> tuple[Any, dict[str, Factors]] | None:
    """The experts under PEFT's wrappers for parameters, and what the active adapters change of each stack.

    None where there are no wrappers, or where they must be called themselves: something hooks one (PEFT does for a
    batch with an adapter for each row), or holds merged adapters.
    """
    found: dict[str, Factors] = {}
    wrapped = False
    while hasattr(module, "parameter_name") and hasattr(module, "base_layer"):
        if module.merged or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return None
        if not module.disable_adapters:
            factors = [_factors(module, name) for name in module.active_adapters if name in module.lora_A]
            found |= {module.parameter_name: _joined(factors)} if factors else {}
        module, wrapped = module.base_layer, True
    return (module, found) if wrapped else None


def _factors(wrapper: Any, adapter: str) -> Factors:
    """Of one adapter, in its own dtype. PEFT's A holds an expert's rows together, its B an expert's columns apart."""
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    experts = wrapper.num_experts
    left, right = b.view(len(b), -1, experts).permute(2, 0, 1), a.view(experts, -1, a.shape[1])
    return Factors(left, right, wrapper.scaling[adapter])


def _joined(factors: list[Factors]) -> Factors:
    """Several changes to a stack as one of their ranks' sum."""
    if len(factors) == 1:
        return factors[0]
    left = torch.cat([each.left * each.scaling for each in factors], dim=2)
    return Factors(left, torch.cat([each.right for each in factors], dim=1), 1.0)


def frozen_product(rows: torch.Tensor, stack: Frozen, offsets: torch.Tensor, factors: Factors | None) -> torch.Tensor:
    """Rows [P, K] sorted by expert times a stack that does not learn, and its change by `factors`: [P, N].

    Args:
        rows: [P, K], in the dtype of the product and of the result.
        stack: asked here, and again for the gradient.
        offsets: int32 [E + 1], where each expert's rows start.
        factors: of the change, in any dtype; gradients have theirs.
    """
    if factors is None:
        return _Product.apply(rows, stack)  # type: ignore[no-any-return]
    return _AdaptedProduct.apply(rows, stack, offsets, *factors)  # type: ignore[no-any-return]


def frozen_experts(
    experts: Any,
    stack: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Weighted sum of each token's experts.

    Args:
        experts: E of them; has `num_experts` and `act_fn`.
        stack: product of rows sorted by expert with the stack of a name, given their offsets.
        hidden_states: [n, D]; top_k_index: [n, experts a token]; top_k_weights: of its shape.
        dtype: of the products.

    Returns:
        [n, D] of the dtype of `hidden_states`.
    """
    order, inverse, offsets = sort_pairs(top_k_index, experts.num_experts)
    rows = gather_pairs(hidden_states, order, inverse, offsets).to(dtype)  # [P, D]
    rows = _gated(stack("gate_up_proj", rows, offsets), experts.act_fn)  # [P, F]
    output = stack("down_proj", rows, offsets)
    return combine_pairs(output, inverse, offsets, top_k_weights).to(hidden_states.dtype)


def _gated(both: torch.Tensor, act_fn: Callable) -> torch.Tensor:
    """act(gate) * up of both side by side [P, 2F] to [P, F], in float32 up to the result."""
    if is_silu(act_fn):
        return swiglu(both)
    gate, up = _wide(both).chunk(2, dim=-1)
    return (act_fn(gate) * up).to(both.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, stack: Frozen) -> torch.Tensor:
        ctx.stack = stack
        return stack.forward(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return ctx.stack.backward(grad.contiguous()), None


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + s (x A^T) B^T."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        stack: Frozen,
        offsets: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            inner = grouped_gemm(rows, _wide(right), offsets).mul_(scaling)  # [P, r]
            ctx.save_for_backward(rows, inner, offsets, left, right)
            ctx.stack, ctx.scaling = stack, scaling
            return stack.forward(rows).add_(grouped_gemm(inner, _wide(left), offsets))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, inner, offsets, left, right = ctx.saved_tensors
        grad_rows = grad_left = grad_right = None
        with torch.autocast(rows.device.type, enabled=False):
            grad = grad.contiguous()
            narrow = grouped_gemm(grad, _wide(left), offsets, transposed=True).mul_(ctx.scaling)  # [P, r]
            if ctx.needs_input_grad[0]:
                grad_rows = ctx.stack.backward(grad)
                grad_rows.add_(grouped_gemm(narrow, _wide(right), offsets, transposed=True))
            if ctx.needs_input_grad[3]:
                grad_left = grouped_wgrad(grad, inner, offsets, dtype=left.dtype)
            if ctx.needs_input_grad[4]:
                grad_right = grouped_wgrad(narrow, rows, offsets, dtype=right.dtype)
        return grad_rows, None, None, grad_left, grad_right, None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least, dense."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
