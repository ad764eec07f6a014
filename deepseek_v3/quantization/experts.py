"""`FP8Experts`: the routed experts as stacks of E4M3 codes with one float32 scale a 128 x 128 block.

Special about it: gate and up lie one above the other in `gate_up_proj`, each with its own grid of blocks, so where
128 does not divide F the scales have 2 * ceil(F / 128) rows. Where the device does not compute FP8, and for gradients,
experts are dequantised for their own products and dropped: on a CPU one by one, on a GPU as many as fit in a gigabyte.
The result is bit for bit that of the dequantised model's "eager" experts. transformers' experts implementations are
not used: they would multiply by raw codes.

Letters: n tokens, K experts a token, P = n * K pairs, E experts, D hidden, F expert width.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..configuration.layout import scale_shape
from ..kernels import combine_pairs, gather_pairs, grouped_fp8_gemm, grouped_gemm, quantize_activation, sort_pairs
from .adapted import Factors, Stacks, frozen_experts, frozen_product
from .linear import CodesModule, computes_in_fp8
from .official_names import fuse_official_names
from .stored import FP8, dequantize_parts

# Experts that are widened at a time on a GPU may take so many bytes.
_BAND_BYTES = 1 << 30


class FP8Experts(CodesModule, Stacks):
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
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        factors: dict[str, Factors] | None = None,
    ) -> torch.Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: [n, D]; top_k_index: [n, K]; top_k_weights: [n, K].
            factors: changes to the stacks by name, which multiply beside the codes.

        Returns:
            [n, D] of the dtype of `hidden_states`.

        Raises:
            ValueError: something other than LoRA parametrises the codes.
        """
        if factors:
            return self._beside(hidden_states, top_k_index, top_k_weights, factors)
        order, inverse, offsets = sort_pairs(top_k_index, self.num_experts)
        rows = gather_pairs(hidden_states, order, inverse, offsets)  # [P, D]
        gate, up = self._stack("gate_up_proj", rows, offsets).chunk(2, dim=-1)
        output = self._stack("down_proj", self.act_fn(gate) * up, offsets)
        return combine_pairs(output, inverse, offsets, top_k_weights).to(hidden_states.dtype)

    def _beside(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, factors: dict[str, Factors]
    ) -> torch.Tensor:
        def stack(name: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return frozen_product(rows, self._codes(name, offsets), offsets, factors.get(name))

        return frozen_experts(self, stack, hidden_states, index, weights, hidden_states.dtype)

    def _stack(self, name: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Product of rows sorted by expert with one stack, and with what a parametrisation adds to it."""
        codes, deltas = self.adapted(name)
        result = frozen_product(rows, self._codes(name, offsets, codes), offsets, None)
        for delta in deltas:
            result = result + grouped_gemm(rows, delta.to(rows.dtype), offsets)
        return result

    def _codes(self, name: str, offsets: torch.Tensor, codes: torch.Tensor | None = None) -> "_Codes":
        codes = self._parameters[name] if codes is None else codes
        scale: torch.Tensor = getattr(self, f"{name}_scale_inv")
        assert codes is not None
        return _Codes(codes.detach(), scale, offsets, self.compute, self.scale_fmt)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        fuse_official_names(self, state_dict, prefix, missing=rest[2], errors=rest[4])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {self.hidden_dim}, {self.intermediate_dim}, compute={self.compute}"


class _Codes(NamedTuple):
    """One stack as a `Frozen`: codes [E, N, K] with their scale, and the offsets [E + 1] of the rows.

    The gradient goes through the dequantised matrices, whatever the product ran in.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offsets: torch.Tensor
    compute: str | None
    scale_fmt: str | None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not computes_in_fp8(rows, self.compute):
            return self._widened(rows, transposed=False)
        x, x_scale = quantize_activation(rows, scale_fmt=self.scale_fmt)
        # Gate and up whose blocks do not join are two products.
        parts = 1 if self.scale.shape[1] == scale_shape(*self.codes.shape[1:])[0] else 2
        pairs = zip(self.codes.chunk(parts, dim=1), self.scale.chunk(parts, dim=1), strict=True)
        products = [grouped_fp8_gemm(x, x_scale, c, s, self.offsets, out_dtype=rows.dtype) for c, s in pairs]
        return products[0] if parts == 1 else torch.cat(products, dim=-1)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        return self._widened(grad, transposed=True)

    def _widened(self, rows: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Rows of experts that live elsewhere come last, and give zeros."""
        experts, height, width = self.codes.shape
        band = max(1, _BAND_BYTES // (height * width * rows.element_size())) if rows.is_cuda else 1
        if band >= experts:  # the host need not wait for the offsets
            return self._product(rows, slice(None), self.offsets, transposed)
        bounds = self.offsets.tolist()
        result = rows.new_zeros(len(rows), width if transposed else height)
        for first in range(0, experts, band):
            stop = min(first + band, experts)
            here = slice(bounds[first], bounds[stop])
            if here.stop > here.start:
                offsets = self.offsets[first : stop + 1] - here.start
                result[here] = self._product(rows[here], slice(first, stop), offsets, transposed)
        return result

    def _product(self, rows: torch.Tensor, experts: slice, offsets: torch.Tensor, transposed: bool) -> torch.Tensor:
        matrices = dequantize_parts(self.codes[experts], self.scale[experts], rows.dtype)
        return grouped_gemm(rows, matrices, offsets, transposed=transposed)
