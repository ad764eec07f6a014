"""Launchers of the grouped matrix products that are written for Hopper by hand."""

import torch
import triton
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..dispatch import processors
from .grouped_hopper import COLUMNS, HALF, ROWS, grouped_columns_hopper, grouped_rows_hopper
from .launch_mla import scratch
from .launching import cdiv


def _tiles(tensor, *block):
    """A descriptor of the tensor by blocks, whose 128 bytes are spread over all banks of the shared memory."""
    layout = NVMMASharedLayout(128, 8 * tensor.element_size(), len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


def _counter(tensor):
    """Of the tiles that have been taken."""
    return torch.zeros(1, dtype=torch.int32, device=tensor.device)


def rows_by_hand(x, w, out, offsets, transposed, x_scale, w_scale, tiling):
    """Writes and returns ``out`` [P, N]: x [P, K] times each expert's own of w [E, N, K], or transposed [E, K, N]."""
    columns, fp8 = out.shape[1], x_scale is not None
    box = (tiling.depth, COLUMNS.value) if transposed else (COLUMNS.value, tiling.depth)
    most = (x.shape[0] // (2 * ROWS.value) + w.shape[0]) * cdiv(columns, COLUMNS.value)
    grouped_rows_hopper[(min(processors(x.device.index), most),)](
        _tiles(x, ROWS.value, tiling.depth), _tiles(w, 1, *box), _tiles(out, ROWS.value, HALF.value), out, offsets,
        _counter(x), x_scale, w_scale, w.shape[0], columns, x.shape[1], out.stride(0),
        *(x_scale.stride() if fp8 else (0, 0)), *(w_scale.stride() if fp8 else (0, 0, 0)),
        DEPTH=tiling.depth, STAGES=tiling.stages, BAND=tiling.band, FP8=fp8, TRANSPOSED=transposed,
        num_warps=tiling.warps,
    )  # fmt: skip
    return out


def columns_by_hand(dy, x, out, offsets, tiling):
    """Writes and returns ``out`` [E, N, K]: each expert's rows of dy [P, N], transposed, times those of x [P, K]."""
    experts, columns, depth = out.shape
    tiles = experts * cdiv(columns, 2 * ROWS.value) * cdiv(depth, COLUMNS.value)
    triton.set_allocator(scratch)
    grouped_columns_hopper[(min(processors(x.device.index), tiles),)](
        dy, x, _tiles(out, 1, ROWS.value, HALF.value), offsets, _counter(x), experts, columns, depth,
        dy.stride(0), x.stride(0), DEPTH=tiling.rows, STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
    return out
