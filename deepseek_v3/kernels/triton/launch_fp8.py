"""Launchers of the FP8 products and of the quantisers."""

from functools import partial

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference.fp8 import GROUP, padded_groups
from ..reference.quantize import AMAX_FLOOR
from ..tuning import active, bucket
from .fp8 import fp8_grouped_columns, fp8_matmul
from .launch_mla import tma_ready
from .launching import cdiv, next_power_of_2
from .quantize import quantize_blocks, quantize_columns, quantize_rows, transpose_tiles, widen_tiles
from .tilings import FP8_DENSE, WGRAD, WGRAD_FEW, tuned

# Groups of 128 rows an expert on average below which a program of its weight gradient sweeps.
FEW_GROUPS = 4


def _tiles(left, right, rows, columns):
    """Descriptors of both operands, or none where the copy engine cannot address one of them."""
    if not (tma_ready(left) and tma_ready(right)):
        return None, None
    return (
        TensorDescriptor(left, list(left.shape), list(left.stride()), [rows, GROUP]),
        TensorDescriptor(right, list(right.shape), list(right.stride()), [columns, GROUP]),
    )


def fp8_gemm(a, a_scale, b, b_scale, out, add, tiling=None):
    """Writes a @ b.T into ``out`` [M, N], or adds it; see ``deepseek_v3.kernels.fp8_gemm``."""
    (rows, depth), columns = a.shape, b.shape[0]
    if not out.numel():
        return out
    by_row = b_scale.shape[0] == columns
    if tiling is None:
        spare = torch.empty_like(out) if active() and add else out
        again = partial(fp8_gemm, a, a_scale, b, b_scale, spare, add)
        sizes = {"rows": bucket(rows), "w": b.shape, "by_row": by_row, "add": add, "out": out.dtype}
        tiling = tuned("fp8_matmul", FP8_DENSE, b, again, **sizes)
    a_tiles, b_tiles = _tiles(a, b, tiling.rows, tiling.columns)
    fp8_matmul[(cdiv(rows, tiling.rows) * cdiv(columns, tiling.columns),)](
        a, b, out, a_tiles, b_tiles, a_scale, b_scale,
        rows, columns, depth, a.stride(0), b.stride(0), out.stride(0), *a_scale.stride(), *b_scale.stride(),
        BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BAND=tiling.band, TMA=a_tiles is not None,
        BY_ROW=by_row, ADD=add, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out


def grouped_fp8_wgrad(dy, dy_scale, x, x_scale, offsets, dtype, tiling=None):
    """See ``deepseek_v3.kernels.grouped_fp8_wgrad``."""
    experts, columns, depth = offsets.numel() - 1, dy.shape[0], x.shape[0]
    out = torch.empty(experts, columns, depth, dtype=dtype, device=x.device)
    if tiling is None:
        again = partial(grouped_fp8_wgrad, dy, dy_scale, x, x_scale, offsets, dtype)
        sizes = {"rows": bucket(dy.shape[1]), "w": (experts, columns, depth), "out": dtype}
        default = WGRAD if dy.shape[1] >= FEW_GROUPS * GROUP * experts else WGRAD_FEW
        tiling = tuned("fp8_grouped_columns", default, x, again, **sizes)
    dy_tiles, x_tiles = _tiles(dy, x, tiling.rows, tiling.columns)
    out_tiles, flat = None, out.view(-1, depth)
    # The experts' matrices as one: a tile may not reach into the next one's rows.
    if dy_tiles is not None and columns % tiling.rows == 0 and tma_ready(flat):
        out_tiles = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [tiling.rows, tiling.columns])
    grid = (cdiv(columns, tiling.rows) * cdiv(depth, tiling.columns * tiling.sweep), experts)
    fp8_grouped_columns[grid](
        dy, x, out, dy_tiles, x_tiles, out_tiles, dy_scale, x_scale, offsets,
        columns, depth, experts, dy.stride(0), x.stride(0), *dy_scale.stride(), *x_scale.stride(),
        BLOCK_E=next_power_of_2(experts + 1), BLOCK_N=tiling.rows, BLOCK_K=tiling.columns, SWEEP=tiling.sweep,
        TMA=dy_tiles is not None, TMA_OUT=out_tiles is not None, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out


def quantize_activation(x, group, scale_fmt, amax_floor, up=None):
    """1 x group tiles of x [M, D], or of silu(x) * up; the scale is stored by group, as the products read it."""
    rows, width = x.shape
    groups = cdiv(width, group)
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(groups, rows, dtype=torch.float32, device=x.device).t()
    if codes.numel():
        block = 32
        quantize_rows[(cdiv(rows, block), groups)](
            x, up, codes, scale, rows, width, x.stride(0), codes.stride(0), *scale.stride(),
            max(amax_floor, AMAX_FLOOR), BLOCK=block, GROUP=group, WIDE=next_power_of_2(group),
            POWER=scale_fmt is not None, SWIGLU=up is not None, num_warps=4,
        )  # fmt: skip
    return codes, scale


def quantize_transposed(x, offsets, group, scale_fmt, amax_floor):
    """group x 1 tiles of x [M, D], transposed; with ``offsets`` each expert's rows start a group of their own."""
    rows, width = x.shape
    experts = 0 if offsets is None else offsets.numel() - 1
    groups = cdiv(rows, group) if offsets is None else padded_groups(rows, experts)
    padded = rows if offsets is None else groups * group
    codes = torch.empty(width, padded, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(groups, width, dtype=torch.float32, device=x.device).t()
    if codes.numel():
        quantize_columns[(groups, cdiv(width, 64))](
            x, codes, scale, offsets, rows, width, experts, x.stride(0), codes.stride(0), *scale.stride(),
            max(amax_floor, AMAX_FLOOR), BLOCK=64, GROUP=group, WIDE=next_power_of_2(group),
            BLOCK_E=next_power_of_2(experts + 1), POWER=scale_fmt is not None, GROUPED=offsets is not None,
            num_warps=4,
        )  # fmt: skip
    return codes, scale


def quantize_weight(w, block, scale_fmt, amax_floor):
    """Blocks of a stack w [E, rows, cols]; both sides of a block are powers of two."""
    experts, rows, cols = w.shape
    grid = (cdiv(rows, block[0]), cdiv(cols, block[1]), experts)
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scale = torch.empty(experts, *grid[:2], dtype=torch.float32, device=w.device)
    if codes.numel():
        quantize_blocks[grid](
            w, codes, scale, rows, cols, *w.stride(), max(amax_floor, AMAX_FLOOR),
            HEIGHT=block[0], WIDTH=block[1], POWER=scale_fmt is not None, num_warps=8,
        )  # fmt: skip
    return codes, scale


def transpose_codes(codes):
    """Codes of a stack [E, rows, cols] with dense rows."""
    experts, rows, cols = codes.shape
    out = torch.empty(experts, cols, rows, dtype=codes.dtype, device=codes.device)
    if out.numel():
        side = 128
        transpose_tiles[(cdiv(rows, side), cdiv(cols, side), experts)](
            codes.view(torch.uint8), out.view(torch.uint8), rows, cols, *codes.stride()[:2], SIDE=side, num_warps=8
        )
    return out


def dequantize_weight(codes, scale, block, dtype):
    """Codes of a stack [E, rows, cols] with dense rows, times its scale."""
    experts, rows, cols = codes.shape
    out = torch.empty(experts, rows, cols, dtype=dtype, device=codes.device)
    if out.numel():
        height, width = min(block[0], 32), min(block[1], 128)
        widen_tiles[(cdiv(rows, height), cdiv(cols, width), experts)](
            codes, scale, out, rows, cols, *codes.stride()[:2], *scale.stride(),
            HEIGHT=block[0], WIDTH=block[1], ROWS=height, COLS=width, num_warps=4,
        )  # fmt: skip
    return out
