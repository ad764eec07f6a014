"""What every converted module shares: the recipe, the codes of its own weights, when FP8 runs.

A converted module is the same object with another class: it owns no parameter more, so names, state dict, optimizer
groups and hooks stay. In `eval()` it computes with its master weights, exactly as the module that it was.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...kernels.fp8 import OUT_DTYPES
from .quantise import Statistics, gradient_codes
from .recipe import FP8Recipe
from .weights import Codes, WeightCodes


class FP8State:
    """One module's share: copies and pickles of the module have the recipe, and no codes."""

    def __init__(self, recipe: FP8Recipe, statistics: Statistics) -> None:
        self.recipe, self.statistics, self.codes = recipe, statistics, WeightCodes()

    def weight(self, *weights: torch.Tensor, transposed: bool) -> Codes:
        """Codes of the weights, see `WeightCodes.of`."""
        return self.codes.of(weights, self.recipe.scale_fmt, self.statistics, transposed)

    def gradient(self, grad: torch.Tensor, along: bool, down: bool) -> tuple[Any, Any]:
        """Codes of an output's gradient [.., N] as Dgrad and as Wgrad take them, see `gradient_codes`."""
        return gradient_codes(grad.reshape(-1, grad.shape[-1]), self.recipe.scale_fmt, self.statistics, along, down)


class FP8Module(nn.Module):
    """Mixin of the converted classes."""

    fp8: FP8State

    def in_fp8(self, x: torch.Tensor) -> bool:
        """Whether the product with `x` is FP8 training's: in `train()`, and there are numbers that it takes."""
        return self.training and x.dtype in OUT_DTYPES and x.numel() > 0

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        self.fp8.codes.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.fp8.codes.clear()
        super()._load_from_state_dict(*arguments)  # type: ignore[misc]


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """What a linear layer gives for `x`: autocast's dtype inside it, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
