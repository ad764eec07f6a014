"""Launchers of the grouped matrix products: tile shapes by the number of rows an expert can expect."""

import math
from functools import partial

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import capability, processors
from ..tuning import bucket
from .grouped import grouped_columns, grouped_few, grouped_rows, grouped_step
from .launch_mla import scratch, tma_ready
from .launching import Launcher, cdiv, next_power_of_2
from .tilings import (
    COLUMNS,
    COLUMNS_BY_HAND,
    FEW,
    FEW_SWIGLU,
    FP8_MANY,
    FP8_MANY_BY_HAND,
    MANY,
    MANY_BY_HAND,
    PLAIN,
    SHORT,
    SHORT_COLUMNS,
    SHORT_ROWS,
    SHORT_SUMS,
    SOME,
    Tiling,
    is_small,
    tuned,
)

_few, _step = Launcher(grouped_few), Launcher(grouped_step)
_rows, _columns = Launcher(grouped_rows), Launcher(grouped_columns)


# Up to so many rows an expert on average, the time is that of reading the weights.
FEW_ROWS = 16


def is_few(pairs: int, experts: int) -> bool:
    """Whether the few-rows kernels are the faster ones for ``pairs`` rows spread over ``experts``."""
    return pairs <= FEW_ROWS * experts


def _row_tiles(pairs: int, experts: int, rows: int) -> int:
    """The most row tiles that any spread of the pairs needs; known without looking at the device."""
    return min(pairs, pairs // rows + experts)


def _precision(tensor: torch.Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def _suits_hopper(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, tiles: int) -> bool:
    """Whether the kernels written for Hopper by hand take these operands; ``tiles``: for a multiprocessor at least."""
    return (
        out.is_cuda
        and capability(out.device.index) == (9, 0)
        and left.dtype == right.dtype
        and left.dtype.itemsize <= out.dtype.itemsize == 2
        and all(map(tma_ready, (left, right, out)))
        and tiles * processors(out.device.index) <= math.prod(out.shape) // (MANY_BY_HAND.rows * MANY_BY_HAND.columns)
    )


def _rows_tiling(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Tiling:
    """The fixed tiling of `grouped_rows` for x [P, K] and a stack w of E matrices."""
    each = out.shape[0] / w.shape[0]
    if x.dtype == torch.float8_e4m3fn:
        # Of few tiles the smaller ones are spread better.
        return FP8_MANY_BY_HAND if each >= 64 and _suits_hopper(x, w, out, 4) else FP8_MANY
    if w.dtype == torch.float32:
        return SHORT_ROWS if out.shape[1] <= SHORT else SHORT_SUMS
    if is_small(w):
        return PLAIN
    return SOME if each < 96 else MANY_BY_HAND if _suits_hopper(x, w, out, 2) else MANY


def _columns_tiling(dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> Tiling:
    """The fixed tiling of `grouped_columns` for gradients ``out`` [E, N, K]."""
    wide = x if x.dtype == torch.float32 else dy
    if wide.dtype == torch.float32 and min(out.shape[1:]) <= SHORT:
        return SHORT_SUMS if out.shape[1] <= out.shape[2] else SHORT_COLUMNS
    if is_small(wide):
        return PLAIN
    return COLUMNS_BY_HAND if _suits_hopper(dy, x, out, 1) else COLUMNS


def grouped_gemm(x, w, offsets, transposed, out_dtype=None, x_scale=None, w_scale=None, tiling=None):
    """See ``deepseek_v3.kernels.grouped_gemm`` and ``grouped_fp8_gemm``; last dimensions are dense."""
    pairs, depth = x.shape
    experts, fp8 = w.shape[0], x_scale is not None
    columns = w.shape[2] if transposed else w.shape[1]
    out = torch.empty(pairs, columns, dtype=out_dtype or w.dtype, device=x.device)
    if not out.numel():
        return out
    if not transposed and is_few(pairs, experts) and tiling is None:
        return grouped_rows_few(x, w, offsets, None, 1, False, out, x_scale, w_scale)
    if tiling is None:
        default = _rows_tiling(x, w, out)
        again = partial(grouped_gemm, x, w, offsets, transposed, out_dtype, x_scale, w_scale)
        kernel = "grouped_rows_fp8" if fp8 else "grouped_rows"
        tiling = tuned(kernel, default, w, again, rows=bucket(pairs), w=w.shape, transposed=transposed)
    if tiling.gluon:
        from .launch_grouped_hopper import rows_by_hand

        return rows_by_hand(x, w, out, offsets, transposed, x_scale, w_scale, tiling)
    tma = not is_small(w) and tma_ready(x) and tma_ready(w)
    x_tiles = w_tiles = None
    if tma:
        x_tiles = TensorDescriptor(x, list(x.shape), list(x.stride()), [tiling.rows, tiling.depth])
        block = [1, tiling.depth, tiling.columns] if transposed else [1, tiling.columns, tiling.depth]
        w_tiles = TensorDescriptor(w, list(w.shape), list(w.stride()), block)
    w_k, w_n = (w.stride(1), w.stride(2)) if transposed else (w.stride(2), w.stride(1))
    programs = _row_tiles(pairs, experts, tiling.rows) * cdiv(columns, tiling.columns)
    operands = (x, w, out, offsets, x_tiles, w_tiles, x_scale, w_scale)
    numbers = (
        experts, columns, depth, x.stride(0), w.stride(0), w_n, w_k, out.stride(0),
        *(x_scale.stride() if fp8 else (0, 0)), *(w_scale.stride() if fp8 else (0, 0, 0)),
    )  # fmt: skip
    constants = {
        "BLOCK_E": next_power_of_2(experts + 1), "BLOCK_M": tiling.rows, "BLOCK_N": tiling.columns,
        "BLOCK_K": tiling.depth, "GROUP_M": tiling.band, "FP8": fp8, "TMA": tma, "TRANSPOSED": transposed,
        "PRECISION": _precision(w), "num_warps": tiling.warps, "num_stages": tiling.stages,
    }  # fmt: skip
    if tma or fp8:  # descriptors, and strides that change with the rows
        grouped_rows[(programs,)](*operands, *numbers, **constants)
    else:
        _rows((programs, 1, 1), operands, numbers, **constants)
    return out


def grouped_rows_few(x, w, offsets, order, top_k, swiglu, out, x_scale=None, w_scale=None, tiling=None):
    """The few-rows form: optional gather of the tokens by ``order``, optional SwiGLU; writes and returns ``out``."""
    pairs, columns = out.shape
    experts, fp8 = w.shape[0], x_scale is not None
    if tiling is None:
        default = FEW_SWIGLU if swiglu else FEW
        again = partial(grouped_rows_few, x, w, offsets, order, top_k, swiglu, out, x_scale, w_scale)
        tiling = tuned("grouped_few", default, w, again, rows=bucket(pairs), w=w.shape, swiglu=swiglu)
    programs = _row_tiles(pairs, experts, tiling.rows) * cdiv(columns, tiling.columns)
    _few(
        (programs, 1, 1), (x, w, out, offsets, order, x_scale, w_scale),
        (experts, columns, x.shape[1], top_k, x.stride(0), w.stride(0), w.stride(1), out.stride(0),
         *(x_scale.stride() if fp8 else (0, 0)), *(w_scale.stride()[:2] if fp8 else (0, 0))),
        BLOCK_E=next_power_of_2(experts + 1), BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BLOCK_K=tiling.depth,
        GATHER=order is not None, SWIGLU=swiglu, FP8=fp8, PRECISION=_precision(w),
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out


def experts_step(x, w, out, offsets, order, top_k, swiglu, shared, first, tokens, tiling=None):
    """``grouped_rows_few`` with the shared experts' rows behind the pairs': shared is (gate, up) or (down, down).

    offsets None: the pairs of one token lie in order, and ``order`` holds their experts. first: the shared experts'
    first row in x.
    """
    experts, columns, depth = w.shape[0], w.shape[1] // 2 if swiglu else w.shape[1], w.shape[2]
    pairs = order.numel() if offsets is None else out.shape[0] - tokens
    if tiling is None:
        default = FEW_SWIGLU if swiglu else FEW
        again = partial(experts_step, x, w, out, offsets, order, top_k, swiglu, shared, first, tokens)
        sizes = {"rows": bucket(pairs), "w": w.shape, "swiglu": swiglu, "shared": shared[0].shape[0]}
        tiling = tuned("grouped_few", default, w, again, **sizes)
    tiles = pairs if offsets is None else _row_tiles(pairs, experts, tiling.rows)
    of_shared = cdiv(shared[0].shape[0], tiling.columns) * cdiv(tokens, tiling.rows)
    _step(
        (of_shared + tiles * cdiv(columns, tiling.columns), 1, 1), (x, w, out, offsets, order, *shared),
        (experts, columns, depth, top_k, x.stride(0), w.stride(0), w.stride(1), out.stride(0), pairs, tokens,
         *shared[0].shape, first, shared[0].stride(0)),
        BLOCK_E=next_power_of_2(experts + 1), BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BLOCK_K=tiling.depth,
        GATHER=first == 0, SWIGLU=swiglu, SORTED=offsets is not None, PRECISION=_precision(x),
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


def grouped_wgrad(dy, x, offsets, dtype, tiling=None):
    """See ``deepseek_v3.kernels.grouped_wgrad``; last dimensions are dense."""
    experts, columns, depth = offsets.numel() - 1, dy.shape[1], x.shape[1]
    wide = x if x.dtype == torch.float32 else dy
    out = torch.empty(experts, columns, depth, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    if tiling is None:
        default = _columns_tiling(dy, x, out)
        again = partial(grouped_wgrad, dy, x, offsets, dtype)
        tiling = tuned("grouped_columns", default, wide, again, rows=bucket(x.shape[0]), w=(experts, columns, depth))
    if tiling.gluon:
        from .launch_grouped_hopper import columns_by_hand

        return columns_by_hand(dy, x, out, offsets, tiling)
    tma = not is_small(wide) and tma_ready(x) and tma_ready(dy)
    if tma and x.is_cuda:
        triton.set_allocator(scratch)
    grid = (cdiv(columns, tiling.depth) * cdiv(depth, tiling.columns), experts, 1)
    operands, numbers = (dy, x, out, offsets), (columns, depth, dy.stride(0), x.stride(0))
    constants = {
        "BLOCK_M": tiling.rows, "BLOCK_N": tiling.depth, "BLOCK_K": tiling.columns, "TMA": tma,
        "PRECISION": _precision(wide), "num_warps": tiling.warps, "num_stages": tiling.stages,
    }  # fmt: skip
    if tma:  # with scratch memory
        grouped_columns[grid](*operands, *numbers, **constants)
    else:
        _columns(grid, operands, numbers, **constants)
    return out
