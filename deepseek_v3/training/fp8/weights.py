"""Codes of a master weight, made once an optimizer step and shared by micro-batches and recomputation.

A weight has changed when the tensor, its memory or its version is another, or when any optimizer has made a step:
an optimizer that writes through `.data` or through a pointer leaves no trace in the version. A module's weights may be
computed anew for each forward (adapters on parameters do so): each product has one place, whose last codes go.
"""

import weakref
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
        self._kept: dict[tuple[torch.Size, ...], tuple[Any, list[Any], Codes]] = {}

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
        key = tuple((w.data_ptr(), w._version, w.device, w.dtype) for w in weights), _steps, scale_fmt
        place = tuple(w.shape for w in weights)  # no two products of a module have the same
        kept_key, kept_weights, made = self._kept.get(place, (None, [], None))
        # A tensor that is gone may have left its address and its id to another.
        same = kept_key == key and all(ref() is w for ref, w in zip(kept_weights, weights, strict=True))
        if made is None or not same:
            stacked = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
            codes, scale = quantize_weight(stacked, scale_fmt=scale_fmt)
            statistics.count("weight", stacked, codes)
            made = Codes(codes, scale, None, None)
        if transposed and made.codes_t is None:
            codes, scale = made.codes, made.scale
            made = Codes(codes, scale, transpose_codes(codes), scale.transpose(-1, -2).contiguous())
        self._kept[place] = key, [weakref.ref(w) for w in weights], made
        return made
