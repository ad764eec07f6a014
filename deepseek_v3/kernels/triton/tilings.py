"""Tile shapes of the matrix products and of the attention kernel: the fixed ones, and lists to choose from by timing.

The fixed ones come from runs on an H200 and an H100. The lists are by architecture: "hopper" for that and later, with
asynchronous products and 227 KiB of shared memory a program, "ampere" for cards before it, with 99 KiB or a little
more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..dispatch import capability
from ..tuning import active


@dataclass(frozen=True)
class Tiling:
    """rows, columns, depth of a tile; stages, warps: Triton's; band: row tiles that share weights in a row.

    gluon: the kernel written for Hopper by hand.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    band: int = 8
    gluon: bool = False


@dataclass(frozen=True)
class Sweep:
    """Tiles of the experts' weight gradient: rows and columns of one, how many a program makes, Triton's numbers."""

    rows: int = 64
    columns: int = 128
    sweep: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Stretch:
    """Of a matrix times a vector: rows of a program, and its warps, each of which reads 256 columns at a time."""

    rows: int
    warps: int

    @property
    def columns(self) -> int:
        """A whole number of 16-byte reads a thread, so that the vector lies in the registers that the matrix needs."""
        return 256 * self.warps


@dataclass(frozen=True)
class AttentionTiling:
    """rows, slots: tile of queries and of cached tokens; halves: output parts; stages, warps: Triton's.

    tma: the cache is read by the copy engine; gluon: the kernel written for Hopper by hand; least: tiles of a split,
    twice as many where the cache has more than ``long``; programs: on a multiprocessor at a time.
    """

    rows: int
    slots: int
    halves: int
    stages: int
    warps: int
    tma: bool
    gluon: bool = False
    least: int = 1
    long: int = 1 << 30
    programs: int = 1


MANY = Tiling(rows=128, columns=256, depth=64, stages=4, warps=8)
SOME = Tiling(rows=64, columns=256, depth=64, stages=4, warps=8)
# Three programs a multiprocessor: the products of the others hide one's float32 promotion.
FP8_MANY = Tiling(rows=64, columns=128, depth=128, stages=3, warps=4)
FP8_DENSE = Tiling(rows=64, columns=128, depth=128, stages=3, warps=4, band=32)
COLUMNS = Tiling(rows=64, columns=256, depth=128, stages=3, warps=8)
# One program a multiprocessor, which all of its shared memory holds a ring of tiles for.
MANY_BY_HAND = Tiling(rows=128, columns=256, depth=64, stages=4, warps=4, gluon=True)
FP8_MANY_BY_HAND = Tiling(rows=128, columns=256, depth=128, stages=4, warps=4, gluon=True)
COLUMNS_BY_HAND = Tiling(rows=64, columns=256, depth=128, stages=4, warps=4, gluon=True)
FEW = Tiling(rows=16, columns=64, depth=128, stages=4, warps=4)
FEW_SWIGLU = Tiling(rows=16, columns=64, depth=128, stages=3, warps=4)
# Float32 and cards before Hopper: no asynchronous products, less shared memory.
PLAIN = Tiling(rows=32, columns=32, depth=32, stages=2, warps=4)
# Float32, where no tensor core serves: a side as short as a low rank, or a short sum. Of the weight gradient, "depth"
# is the tile's height.
SHORT_ROWS = Tiling(rows=128, columns=16, depth=32, stages=3, warps=4)
SHORT_SUMS = Tiling(rows=64, columns=64, depth=16, stages=3, warps=4)
SHORT_COLUMNS = Tiling(rows=64, columns=16, depth=32, stages=3, warps=4)
SHORT = 16
WGRAD = Sweep()
# Few rows an expert make a tile short work, of which a program then does several.
WGRAD_FEW = Sweep(sweep=4, stages=2)

SINGLE = Stretch(rows=2, warps=8)
SINGLE_SWIGLU = Stretch(rows=1, warps=4)
# Few rows, as of the projections down; and a short depth, of which a warp is to have more than one stretch.
SINGLE_FEW = Stretch(rows=2, warps=4)
SINGLE_SHALLOW = Stretch(rows=2, warps=1)

# Few rows are bound by memory: a 16-row tile and deep asynchronous copies. Many rows are bound by arithmetic: 64-row
# tiles, half of the output each.
FEW_ROWS = AttentionTiling(rows=16, slots=64, halves=1, stages=3, warps=4, tma=False)
SOME_ROWS = AttentionTiling(rows=32, slots=64, halves=1, stages=3, warps=4, tma=False)
MANY_ROWS = AttentionTiling(rows=64, slots=64, halves=2, stages=2, warps=4, tma=True)
FEW_ROWS_FP8_BY_HAND = AttentionTiling(
    rows=16, slots=64, halves=1, stages=2, warps=4, tma=True, gluon=True, least=2, long=128, programs=2
)
# Two tiles of 64 slots at a time; below two such pairs a split is no faster, and there are more of them to join.
MANY_ROWS_BY_HAND = AttentionTiling(rows=64, slots=128, halves=1, stages=2, warps=4, tma=True, gluon=True, least=2)
MANY_ROWS_POINTERS = AttentionTiling(rows=64, slots=64, halves=2, stages=2, warps=4, tma=False)
# FP8 tiles pass through registers: eight warps have room for this one and the next.
FEW_ROWS_FP8 = AttentionTiling(rows=16, slots=64, halves=1, stages=1, warps=8, tma=False)
# Cards before Hopper hold 100 KB of shared memory or a little more.
SMALL_CARD = AttentionTiling(rows=16, slots=32, halves=1, stages=2, warps=4, tma=False)

# Of FP8 weights one tile may not reach over two scales: 128 deep, at most 128 columns.
_FEW = (
    Tiling(rows=16, columns=32, depth=128, stages=4, warps=4),
    Tiling(rows=16, columns=64, depth=128, stages=2, warps=4),
    Tiling(rows=16, columns=64, depth=128, stages=5, warps=4),
    Tiling(rows=16, columns=128, depth=128, stages=3, warps=8),
    Tiling(rows=32, columns=64, depth=128, stages=3, warps=4),
)
_FP8_ROWS = (
    Tiling(rows=64, columns=128, depth=128, stages=4, warps=4),
    Tiling(rows=64, columns=64, depth=128, stages=4, warps=4),
    Tiling(rows=128, columns=128, depth=128, stages=3, warps=8),
    Tiling(rows=128, columns=64, depth=128, stages=4, warps=4),
)
_SWEEPS = (Sweep(), Sweep(stages=2), Sweep(sweep=4), Sweep(sweep=4, stages=2), Sweep(rows=128, warps=8))
LISTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "hopper": {
        "grouped_rows": (
            MANY,
            SOME,
            Tiling(rows=128, columns=128, depth=64, stages=4, warps=8),
            Tiling(rows=64, columns=128, depth=64, stages=4, warps=4),
            Tiling(rows=128, columns=256, depth=64, stages=3, warps=8, band=16),
        ),
        "grouped_rows_fp8": _FP8_ROWS,
        "grouped_few": _FEW,
        "grouped_columns": (
            Tiling(rows=64, columns=256, depth=128, stages=2, warps=8),
            Tiling(rows=64, columns=128, depth=128, stages=4, warps=4),
            Tiling(rows=128, columns=128, depth=128, stages=3, warps=8),
        ),
        "fp8_matmul": _FP8_ROWS,
        "fp8_grouped_columns": _SWEEPS,
        "mla_few": (
            AttentionTiling(rows=16, slots=64, halves=1, stages=2, warps=4, tma=False),
            AttentionTiling(rows=16, slots=32, halves=1, stages=4, warps=4, tma=False),
            AttentionTiling(rows=16, slots=128, halves=1, stages=1, warps=8, tma=False),
        ),
        "mla_by_hand": (MANY_ROWS, SOME_ROWS),
    },
    "ampere": {
        "grouped_rows": (
            Tiling(rows=64, columns=64, depth=32, stages=3, warps=4),
            Tiling(rows=64, columns=128, depth=32, stages=3, warps=4),
            Tiling(rows=128, columns=128, depth=32, stages=3, warps=8),
            Tiling(rows=64, columns=64, depth=64, stages=3, warps=4),
        ),
        "grouped_rows_fp8": _FP8_ROWS,
        "grouped_few": _FEW,
        "grouped_columns": (
            Tiling(rows=32, columns=64, depth=64, stages=3, warps=4),
            Tiling(rows=32, columns=128, depth=128, stages=3, warps=8),
        ),
        "fp8_matmul": _FP8_ROWS,
        "fp8_grouped_columns": _SWEEPS,
        "mla_few": (
            AttentionTiling(rows=16, slots=16, halves=1, stages=3, warps=4, tma=False),
            AttentionTiling(rows=16, slots=32, halves=1, stages=1, warps=4, tma=False),
        ),
        "mla_by_hand": (),
    },
}


def is_small(tensor: torch.Tensor) -> bool:
    """Whether tiles must be small: float32 products, or a card before Hopper."""
    return tensor.dtype == torch.float32 or before_hopper(tensor.device)


def before_hopper(device: torch.device) -> bool:
    """Whether the card is older than Hopper; the interpreter counts as one."""
    return device.type == "cuda" and capability(device.index) < (9, 0)


def tuned(kernel: str, default: Any, operand: torch.Tensor, run: Callable[..., Any], **sizes: Any) -> Any:
    """The default, or where tuning is on the fastest of the kernel's list.

    Args:
        operand: tells the device and the dtype; float32 is not tuned.
        run: launches the kernel with ``tiling=``.
        sizes: what the choice depends on.
    """
    tuner, device = active(), operand.device
    if tuner is None or operand.dtype == torch.float32:
        return default
    listed = LISTS["ampere" if before_hopper(device) else "hopper"][kernel]
    tilings = (default, *(tiling for tiling in listed if tiling != default))
    sizes["dtype"] = operand.dtype
    return tuner.choose(kernel, sizes, device, tilings, lambda tiling: run(tiling=tiling))
