"""Launchers of the steps of FP8 training between its products."""

import torch

from ..reference.fp8 import padded_groups
from ..reference.quantize import AMAX_FLOOR
from .e5m6 import pack_tiles, unpack_tiles
from .fp8_training import (
    find_tiles,
    retile_both,
    retile_columns,
    swiglu_codes,
    swiglu_gradient,
    swiglu_gradient_columns,
    swiglu_gradient_rows,
)
from .launching import cdiv, next_power_of_2

# Columns of a program that writes down columns, of one tensor and of SwiGLU's three: many small programs hide each
# other's waiting, which a loop over columns within one does not.
BLOCK, BLOCK_SWIGLU = 64, 32


def retile(x, x_scale, source, offsets, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.retile``."""
    width = x.shape[1]
    rows = x.shape[0] if source is None else source.shape[0]
    groups, padded, tiles = _tiles(rows, offsets)
    codes, scale = _pair(width, padded, groups, x.device)
    if codes.numel():
        retile_columns[(groups, cdiv(width, BLOCK))](
            x, x_scale, source, codes, scale, tiles, rows, width, x.stride(0),
            *(x_scale.stride() if x_scale is not None else (0, 0)), codes.stride(0), *scale.stride(),
            max(amax_floor, AMAX_FLOOR), BLOCK=BLOCK, POWER=scale_fmt is not None, SCALED=x_scale is not None,
            GATHER=source is not None, GROUPED=offsets is not None, num_warps=4,
        )  # fmt: skip
    return codes, scale


def quantize_both(x, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.quantize_both``."""
    rows, width = x.shape
    groups = cdiv(rows, 128)
    codes, scale = _pair(width, rows, groups, x.device)
    along, scale_along = _pair(rows, width, cdiv(width, 128), x.device)
    if codes.numel():
        retile_both[(groups, cdiv(width, 128) * (256 // BLOCK))](
            x, codes, scale, along, scale_along, rows, width, x.stride(0), rows, *scale.stride(), width,
            *scale_along.stride(), max(amax_floor, AMAX_FLOOR), SIDE=BLOCK, POWER=scale_fmt is not None, num_warps=4,
        )  # fmt: skip
    return along, scale_along, codes, scale


def _tiles(rows, offsets):
    """Groups of 128 rows, the rows that they make, and where each expert's rows start a group, the rows of each."""
    if offsets is None:
        return cdiv(rows, 128), rows, None
    experts = offsets.numel() - 1
    groups = padded_groups(rows, experts)
    tiles = torch.empty(2, groups, dtype=torch.int32, device=offsets.device)
    find_tiles[(groups,)](offsets, tiles, experts, BLOCK_E=next_power_of_2(experts + 1), num_warps=4)
    return groups, groups * 128, tiles


def _pair(rows, width, groups, device):
    """Room for codes [rows, width] and their scales [rows, groups], stored by group."""
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty(groups, rows, dtype=torch.float32, device=device).t()


def swiglu_forward_codes(gate_up, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.swiglu_forward_codes``; 128 divides F."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = _pair(rows, width, width // 128, gate_up.device)
    kept = _pair(rows, 2 * width, 2 * width // 128, gate_up.device)
    if rows:
        block = 16
        swiglu_codes[(cdiv(rows, block), width // 128)](
            gate_up, *product, *kept, rows, width, gate_up.stride(0), *product[1].stride(), *kept[1].stride(),
            max(amax_floor, AMAX_FLOOR), BLOCK=block, POWER=scale_fmt is not None, num_warps=4,
        )  # fmt: skip
    return *product, *kept


def swiglu_backward(gate_up, scale, grad, weights):
    """See ``deepseek_v3.kernels.swiglu_backward``."""
    rows, width = grad.shape
    grad_gate_up = torch.empty(rows, 2 * width, dtype=grad.dtype, device=grad.device)
    out = torch.empty_like(grad)
    share = torch.empty(rows, dtype=torch.float32, device=grad.device)
    if out.numel():
        block = 8
        swiglu_gradient[(cdiv(rows, block),)](
            gate_up, scale, grad, weights, grad_gate_up, out, share, rows, width, gate_up.stride(0),
            *(scale.stride() if scale is not None else (0, 0)), grad.stride(0),
            BLOCK=block, SCALED=scale is not None, WEIGHTED=weights is not None, num_warps=4,
        )  # fmt: skip
    return grad_gate_up, out, share


def swiglu_backward_codes(gate_up, scale, grad, weights, offsets, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.swiglu_backward_codes``; 128 divides F."""
    rows, width = grad.shape
    along = _pair(rows, 2 * width, 2 * width // 128, grad.device)
    share = torch.empty(width // 128 if weights is not None else 0, rows, dtype=torch.float32, device=grad.device)
    groups, padded, tiles = _tiles(rows, offsets)
    down, product = (_pair(height, padded, groups, grad.device) for height in (2 * width, width))
    strides = gate_up.stride(0), *(scale.stride() if scale is not None else (0, 0)), grad.stride(0)
    kinds = {"POWER": scale_fmt is not None, "SCALED": scale is not None, "WEIGHTED": weights is not None}
    least = max(amax_floor, AMAX_FLOOR)
    if rows:
        block = 16
        swiglu_gradient_rows[(cdiv(rows, block), width // 128)](
            gate_up, scale, grad, weights, share, *along, rows, width, *strides, *along[1].stride(), least,
            BLOCK=block, **kinds, num_warps=4,
        )  # fmt: skip
        # Of experts a little over 128 registers, which would leave room for three programs instead of four.
        swiglu_gradient_columns[(groups, width // BLOCK_SWIGLU)](
            gate_up, scale, grad, weights, *down, *product, tiles, rows, width, *strides, padded, *down[1].stride(),
            *product[1].stride(), least, BLOCK=BLOCK_SWIGLU, **kinds, GROUPED=offsets is not None, num_warps=4,
            maxnreg=None if offsets is None else 128,
        )  # fmt: skip
    return *along, *down, *product, share.sum(0)


def pack_e5m6(x):
    """See ``deepseek_v3.kernels.pack_e5m6``."""
    rows, width = x.shape
    groups = cdiv(width, 128)
    high = torch.empty(rows, groups * 128, dtype=torch.uint8, device=x.device)
    low = torch.empty(rows, groups * 64, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    if rows:
        pack_tiles[(cdiv(rows, 32), groups)](
            x, high, low, scale, rows, width, x.stride(0), groups, BLOCK=32, num_warps=4
        )
    return high, low, scale


def unpack_e5m6(high, low, scale, width, dtype):
    """See ``deepseek_v3.kernels.unpack_e5m6``."""
    out = torch.empty(high.shape[0], width, dtype=dtype, device=high.device)
    if out.numel():
        rows, groups = scale.shape
        unpack_tiles[(cdiv(rows, 16), groups)](high, low, scale, out, rows, width, groups, BLOCK=16, num_warps=4)
    return out
