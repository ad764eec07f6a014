"""`FP8Experts`: the routed experts as stacks of E4M3 codes with one float32 scale a 128 x 128 block.

Special about it: gate and up lie one above the other in `gate_up_proj`, each with its own grid of blocks, so where
128 does not divide F the scales have 2 * ceil(F / 128) rows. Where the device does not compute FP8, each expert that
a token reaches is dequantised for its own products and dropped, and the result is bit for bit that of the
dequantised model's "eager" experts; the stack is never widened whole. transformers' experts implementations are
not used: they would multiply by raw codes.

Letters: n tokens, K experts a token, P = n * K pairs, E experts, D hidden, F expert width.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from ..configuration.layout import scale_shape
from ..kernels import combine_pairs, gather_pairs, grouped_fp8_gemm, grouped_gemm, quantize_activation, sort_pairs
from .linear import CodesModule, computes_in_fp8, weight_only
from .official_names import fuse_official_names
from .stored import FP8, dequantize_parts


class FP8Experts(CodesModule):
    """E SwiGLU experts as codes.

    Attributes:
        gate_up_proj: float8_e4m3fn [E, 2F, D], gate rows first; gate_up_proj_scale_inv: float32
            [E, 2 * ceil(F / 128), ceil(D / 128)], gate's blocks first.
        down_proj: float8_e4m3fn [E, D, F]; down_proj_scale_inv: float32 [E, ceil(D / 128), ceil(F / 128)].
    """

    gate_up_proj: nn.Parameter
    gate_up_proj_scale_inv: nn.Parameter
    down_proj: nn.Parameter
    down_proj_scale_inv: nn.Parameter
    # What `model.dequantize()` makes of it again: called with the model's configuration.
    plain_class: Any = None

    # Read by transformers' expert parallelism.
    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, experts: int, hidden: int, width: int, act_fn: Any, config: Any = None) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, width
        self.act_fn = act_fn
        self.compute = getattr(config, "compute", None)
        self.scale_fmt = getattr(config, "activation_scale_fmt", None)
        rows, columns = scale_shape(width, hidden)
        shapes = {
            "gate_up_proj": ((experts, 2 * width, hidden), (experts, 2 * rows, columns)),
            "down_proj": ((experts, hidden, width), (experts, columns, rows)),
        }
        for name, (codes, scales) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(codes, dtype=FP8), requires_grad=False))
            scale = nn.Parameter(torch.empty(scales, dtype=torch.float32), requires_grad=False)
            self.register_parameter(f"{name}_scale_inv", scale)

    @classmethod
    def like(cls, experts: nn.Module, config: Any = None) -> "FP8Experts":
        """One of the same sizes as fused experts in another dtype, its codes not filled in."""
        e: Any = experts
        with torch.device(e.gate_up_proj.device):
            new = cls(e.num_experts, e.hidden_dim, e.intermediate_dim, e.act_fn, config)
        new.plain_class = type(experts)
        return new

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: [n, D]; top_k_index: [n, K]; top_k_weights: [n, K].

        Returns:
            [n, D] of the dtype of `hidden_states`.

        Raises:
            ValueError: something other than LoRA parametrises the codes.
        """
        order, inverse, offsets = sort_pairs(top_k_index, self.num_experts)
        rows = gather_pairs(hidden_states, order, inverse, offsets)  # [P, D]
        gate, up = self._stack("gate_up_proj", rows, offsets).chunk(2, dim=-1)
        output = self._stack("down_proj", self.act_fn(gate) * up, offsets)
        return combine_pairs(output, inverse, offsets, top_k_weights).to(hidden_states.dtype)

    def _stack(self, name: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Product of rows sorted by expert with one stack, and with what adapters add to it."""
        codes, deltas = self.adapted(name)
        scale = getattr(self, f"{name}_scale_inv")
        if computes_in_fp8(rows, self.compute):
            result = self._grouped(rows, codes, scale, offsets)
        else:
            result = _one_by_one(rows, codes, scale, offsets)
        for delta in deltas:
            result = result + grouped_gemm(rows, delta.to(rows.dtype), offsets)
        return result

    def _grouped(
        self, rows: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        if scale.shape[1] == scale_shape(codes.shape[1], codes.shape[2])[0]:
            return _Grouped.apply(rows, codes, scale, offsets, self.scale_fmt)
        # Gate and up whose blocks do not join.
        halves = zip(codes.chunk(2, dim=1), scale.chunk(2, dim=1), strict=True)
        return torch.cat([_Grouped.apply(rows, c, s, offsets, self.scale_fmt) for c, s in halves], dim=-1)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        fuse_official_names(self, state_dict, prefix, missing=rest[2], errors=rest[4])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {self.hidden_dim}, {self.intermediate_dim}, compute={self.compute}"


def _one_by_one(rows: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each expert's rows with its own matrix, dequantised for the product and dropped."""
    bounds = offsets.tolist()
    results = []
    for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if stop > start:
            widen = partial(dequantize_parts, codes[expert], scale[expert])
            results.append(weight_only(rows[start:stop], widen))
    # Pairs of experts that live elsewhere come last.
    results.append(rows.new_zeros(len(rows) - bounds[-1], codes.shape[1]))
    return torch.cat(results)


class _Grouped(torch.autograd.Function):
    """FP8 product by expert; the gradient to the rows goes through each expert's dequantised matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        offsets: torch.Tensor,
        scale_fmt: str | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scale, offsets)
        x, x_scale = quantize_activation(rows, scale_fmt=scale_fmt)
        return grouped_fp8_gemm(x, x_scale, codes, scale, offsets, out_dtype=rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        codes, scale, offsets = ctx.saved_tensors
        result = grad.new_zeros(len(grad), codes.shape[2])
        bounds = offsets.tolist()
        for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if stop > start:
                result[start:stop] = grad[start:stop] @ dequantize_parts(codes[expert], scale[expert], grad.dtype)
        return result, None, None, None, None
