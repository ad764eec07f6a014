"""Codes of a master weight, made once an optimizer step and shared by micro-batches and recomputation.

A weight has changed when the parameter, its memory or its version is another, or when any optimizer has made a step:
an optimizer that writes through `.data` or through a pointer leaves no trace in the version.
"""

from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...kernels import quantize_weight, transpose_codes
from .quantise import Statistics

_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Codes(NamedTuple):
    """One weight [.., N, K]: codes and scales for the product, and transposed for the input gradient (128 x 128
    blocks stay blocks)."""

    codes: torch.Tensor
    scale: torch.Tensor
    codes_t: torch.Tensor | None
    scale_t: torch.Tensor | None


class WeightCodes:
    """The codes of a module's weights, dropped by whatever copies or moves the module."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], tuple[Any, Codes]] = {}

    def __deepcopy__(self, memo: Any) -> "WeightCodes":
        return WeightCodes()

    def __reduce__(self) -> Any:
        return WeightCodes, ()

    def clear(self) -> None:
        """Forget all codes."""
        self._kept.clear()

    @torch.no_grad()
    def of(
        self, weights: tuple[torch.Tensor, ...], scale_fmt: str | None, statistics: Statistics, transposed: bool
    ) -> Codes:
        """The codes of `weights` as they are now, quantised if they are not there yet.

        Args:
            weights: one [.., N, K], or several [N_i, K] that are stacked to one product.
            scale_fmt: as of `quantize_weight`. statistics: counts what is lost.
            transposed: whether the input gradient's form is needed.
        """
        key = tuple((id(w), w.data_ptr(), w._version, w.device, w.dtype) for w in weights), _steps, scale_fmt
        name = tuple(id(w) for w in weights)
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            stacked = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
            codes, scale = quantize_weight(stacked, scale_fmt=scale_fmt)
            statistics.count("weight", stacked, codes)
            kept = key, Codes(codes, scale, None, None)
        if transposed and kept[1].codes_t is None:
            codes, scale = kept[1].codes, kept[1].scale
            kept = key, Codes(codes, scale, transpose_codes(codes), scale.transpose(-1, -2).contiguous())
        self._kept[name] = kept
        return kept[1]
