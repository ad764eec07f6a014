"""Codes of activations and gradients as the products read them, and the count of what E4M3 loses."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels import quantize_activation, quantize_both, retile

Pair = tuple[torch.Tensor, torch.Tensor]  # codes and scales
COUNTS = ("underflow", "overflow", "nan", "elements")


@dataclass
class Statistics:
    """Counts of one model's FP8 tensors by class ("activation", "gradient", "weight"), on the device.

    underflow: numbers other than zero whose code is zero. overflow: infinities (scales of the current values let no
    finite number overflow). nan: not a number.
    """

    active: bool = False
    counts: dict[str, torch.Tensor] = field(default_factory=dict)

    def count(self, kind: str, values: torch.Tensor, codes: torch.Tensor) -> None:
        """Add the elements of `values`, quantised to `codes`, to a class. Nothing is read back to the host."""
        if not self.active:
            return
        lost = ((values != 0) & (codes.float() == 0)).sum()
        here = torch.stack((lost, values.isinf().sum(), values.isnan().sum(), torch.full_like(lost, values.numel())))
        self.counts[kind] = here if kind not in self.counts else self.counts[kind].to(here.device) + here

    def drain(self) -> dict[str, dict[str, int]]:
        """The counts so far as numbers, and begin anew."""
        counts = {kind: dict(zip(COUNTS, value.tolist(), strict=True)) for kind, value in self.counts.items()}
        self.counts.clear()
        return counts


@torch.no_grad()
def input_codes(x: torch.Tensor, scale_fmt: str | None, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and scales [M, ceil(K / 128)] of the input of linear layers [.., K].

    They stay with the tensor, so that layers that read one input quantise it once; they go when it goes, and an
    update in place makes them void.
    """
    holder: Any = x
    kept = getattr(holder, "_fp8_codes", None)
    if kept is not None and kept[:2] == (x._version, scale_fmt):
        return kept[2]
    rows = x.detach().reshape(-1, x.shape[-1])
    made = quantize_activation(rows, scale_fmt=scale_fmt)
    statistics.count("activation", rows, made[0])
    holder._fp8_codes = (x._version, scale_fmt, made)
    return made


def gradient_codes(
    grad: torch.Tensor, scale_fmt: str | None, statistics: Statistics, along: bool = True, down: bool = False
) -> tuple[Any, Any]:
    """Codes [M, N] and scales [M, ceil(N / 128)] of an output's gradient [M, N] where `along` (for Dgrad), and codes
    [N, M] and scales [N, ceil(M / 128)] where `down` (for Wgrad); None for what is not wanted. One read for both."""
    rows: Pair | None = None
    columns: Pair | None = None
    if along and down:
        codes, scale, *turned = quantize_both(grad, scale_fmt=scale_fmt)
        rows, columns = (codes, scale), (turned[0], turned[1])
    elif along:
        rows = quantize_activation(grad, scale_fmt=scale_fmt)
    elif down:
        columns = retile(grad, scale_fmt=scale_fmt)
    if rows is not None:
        statistics.count("gradient", grad, rows[0])
    return rows, columns
