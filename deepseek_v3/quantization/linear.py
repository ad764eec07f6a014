"""`FP8Linear`: a linear layer whose weight stays in E4M3 codes with one float32 scale a 128 x 128 block.

Two products. Weight-only: the matrix is dequantised for the product and dropped, which gives bit for bit what the
dequantised model gives; the path of the CPU. Dynamic: activations are quantised in 1 x 128 tiles and both operands
multiply in FP8 (DeepSeek-V3 report, section 3.3); the path of a GPU that computes FP8. The weight is frozen; the
gradient to the input goes through the dequantised matrix in both.

Letters: M rows, K input features, N output features.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration.layout import scale_shape
from ..kernels import dequantize_weight, fp8_gemm, quantize_activation
from ..kernels.dispatch import cuda_reason
from ..kernels.fp8 import OUT_DTYPES
from .codes import Codes
from .stored import FP8


def computes_in_fp8(x: torch.Tensor, compute: str | None) -> bool:
    """Whether the product with activations `x` runs in FP8, by `FP8Config.compute`."""
    return x.dtype in OUT_DTYPES and x.numel() > 0 and multiplies_fp8(x.device, compute)


def multiplies_fp8(device: torch.device, compute: str | None) -> bool:
    """Whether products on `device` run in FP8 where the activations' dtype allows it."""
    return compute == "dynamic" or (compute is None and cuda_reason(device, (9, 0)) is None)


class _WeightOnly(torch.autograd.Function):
    """Keeps the codes for the backward, not the dequantised matrix: a layer's memory stays that of FP8."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, widen: Callable[[torch.dtype], torch.Tensor]
    ) -> torch.Tensor:
        ctx.widen, ctx.dtype, ctx.bias_dtype = widen, x.dtype, None if bias is None else bias.dtype
        return F.linear(x, widen(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grad_bias = None
        if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return (grad @ ctx.widen(grad.dtype)).to(ctx.dtype), grad_bias, None


class _Dynamic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, scale_fmt: str | None
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        rows, row_scale = quantize_activation(x.reshape(-1, x.shape[-1]), scale_fmt=scale_fmt)
        return fp8_gemm(rows, row_scale, codes, scale, out_dtype=x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        codes, scale = ctx.saved_tensors
        return grad @ dequantize_weight(codes, scale, dtype=grad.dtype), None, None, None


def weight_only(
    x: torch.Tensor, widen: Callable[[torch.dtype], torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x` times the transposed matrix that `widen(dtype)` gives, which is called again for the gradient."""
    return _WeightOnly.apply(x, bias, widen)


class CodesModule(nn.Module):
    """What every module with codes needs: they stay frozen, and no cast of a model to another dtype reaches them."""

    def codes_and_scales(self) -> list[nn.Parameter]:
        """The parameters that are codes or scales."""
        named = dict(self.named_parameters(recurse=False))
        return [p for name, p in named.items() if p.dtype == FP8 or name.endswith("_scale_inv")]

    def freeze(self) -> None:
        """Take codes and scales out of training, and out of reach of what would be merged into them."""
        for name, parameter in list(self._parameters.items()):
            if parameter is not None and (parameter.dtype == FP8 or name.endswith("_scale_inv")):
                parameter.requires_grad_(False)
                plain = parameter.dtype == FP8 and type(parameter) is nn.Parameter
                self._parameters[name] = Codes(parameter) if plain else parameter

    def adapted(self, name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The codes called `name`, and the changes, of the same shape, to the matrices that they stand for.

        PEFT's `target_parameters` puts its delta on the parameter for the time of a forward. Added to the codes it
        would lack their scales and drown in their rounding; beside them it is exact and learns.

        Raises:
            ValueError: something other than LoRA parametrises the codes.
        """
        changed: Any = getattr(self, "parametrizations", {})
        if name not in changed:
            return getattr(self, name), []
        deltas: list[Any] = [getattr(adapter, "delta_weight", None) for adapter in changed[name]]
        if any(delta is None for delta in deltas):
            raise ValueError(
                f"{name} holds FP8 codes, which only LoRA can adapt. Load the model with "
                "quantization_config=FP8Config(keep=False)"
            )
        return changed[name].original, deltas

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        kept = {id(parameter) for parameter in self.codes_and_scales()}

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in kept:
                return fn(tensor)
            # As integers they are moved like any other tensor and cast by nothing.
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)

        super()._apply(guarded, recurse)
        self.freeze()  # another device may have made new parameters
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if given is not None and parameter.dtype == FP8 != given.dtype:
                rest[4].append(
                    f"{prefix}{name} is {given.dtype} in the state dict and FP8 codes in the model; load the model "
                    "with quantization_config=FP8Config(keep=False)"
                )
                state_dict[prefix + name] = parameter.detach()
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[call-arg]


def keeps_fp8(model: nn.Module) -> bool:
    """Whether any module of `model` holds FP8 codes."""
    return any(isinstance(module, CodesModule) for module in model.modules())


class FP8Linear(CodesModule, nn.Linear):
    """`y = x W^T + b` with W as codes.

    Attributes:
        weight: float8_e4m3fn [N, K], frozen.
        weight_scale_inv: float32 [ceil(N / 128), ceil(K / 128)], what the codes are multiplied by; frozen.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, config: Any = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute = getattr(config, "compute", None)
        self.scale_fmt = getattr(config, "activation_scale_fmt", None)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        scales = torch.empty(scale_shape(out_features, in_features), dtype=torch.float32)
        self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None  # type: ignore[assignment]

    @classmethod
    def like(cls, linear: nn.Linear, config: Any = None) -> "FP8Linear":
        """One of the same size and bias, its codes not filled in."""
        with torch.device(linear.weight.device):
            new = cls(linear.in_features, linear.out_features, linear.bias is not None, config)
        new.bias = linear.bias
        return new

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [N, K] that the codes stand for, computed anew at each call."""
        return dequantize_weight(self.weight, self.weight_scale_inv, dtype=dtype)

    @property
    def W_q(self) -> torch.Tensor:
        """The codes, by the name at which PEFT learns that a matrix has to be asked for by `dequantize`."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """Refused: PEFT asks where the matrix itself takes part in an adapter, and would cast what that learns to FP8.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "DoRA works on the norms of a whole matrix, and this one is FP8 codes. Load the model with "
            "quantization_config=FP8Config(keep=False), or leave use_dora out"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., K] to [.., N], of the dtype of `x`, with what adapters add.

        Raises:
            ValueError: something other than LoRA parametrises the codes.
        """
        (weight, deltas), scale = self.adapted("weight"), self.weight_scale_inv
        if computes_in_fp8(x, self.compute):
            output = _Dynamic.apply(x, weight, scale, self.scale_fmt)
            output = output if self.bias is None else output + self.bias
        else:
            output = weight_only(x, lambda dtype: dequantize_weight(weight, scale, dtype=dtype), self.bias)
        for delta in deltas:
            output = output + F.linear(x, delta.to(x.dtype))
        return output

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, compute={self.compute}"
