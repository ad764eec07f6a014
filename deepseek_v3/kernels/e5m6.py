"""The report's 12-bit numbers for what the attention gives to its output projection: packing and unpacking.

E5M6 under scales that are powers of two, one for 1 x 128 tiles (DeepSeek-V3 report, section 3.3.3).
"""

import torch

from . import dispatch
from .quantize import TRITON_DTYPES
from .reference import e5m6 as reference

OPERATION = "e5m6"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _is_triton(x: torch.Tensor, dtype: torch.dtype, backend: str) -> bool:
    reasons = _reasons(x.device)
    reasons["triton"] = reasons["triton"] or (None if dtype in TRITON_DTYPES else f"{dtype}")
    return dispatch.choose(OPERATION, reasons, backend, x.device) == "triton"


def _pack_fake(x, backend):
    groups = (x.shape[1] + 127) // 128
    high, low = (x.new_empty(x.shape[0], groups * size, dtype=torch.uint8) for size in (128, 64))
    return high, low, x.new_empty(x.shape[0], groups, dtype=torch.float32)


@dispatch.define("pack_e5m6(Tensor x, str backend) -> (Tensor, Tensor, Tensor)", _pack_fake)
def _pack(x, backend):
    if not _is_triton(x, x.dtype, backend):
        return reference.pack_e5m6(x)
    from .triton.launch_fp8_training import pack_e5m6 as launch

    return launch(x if x.stride(-1) == 1 else x.contiguous())


@dispatch.define(
    "unpack_e5m6(Tensor high, Tensor low, Tensor scale, SymInt width, ScalarType dtype, str backend) -> Tensor",
    lambda high, low, scale, width, dtype, backend: scale.new_empty(high.shape[0], width, dtype=dtype),
)
def _unpack(high, low, scale, width, dtype, backend):
    if not _is_triton(high, dtype, backend):
        return reference.unpack_e5m6(high, low, scale, width, dtype)
    from .triton.launch_fp8_training import unpack_e5m6 as launch

    return launch(high, low, scale, width, dtype)


def pack_e5m6(x: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to E5M6, nearest even, in 12 bits.

    Args:
        x: [M, D], a floating dtype. backend: "auto", "triton" or "torch"; they agree bit for bit.

    Returns:
        high: uint8 [M, 128 G], G = ceil(D / 128), sign, exponent and the first 2 mantissa bits.
        low: uint8 [M, 64 G], the other 4 mantissa bits, of columns j and j + 64 of a tile in one byte.
        scale: float32 [M, G], powers of two; NaN for a tile that holds NaN or infinity.

    Raises:
        ValueError: x is no floating matrix.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating matrix [M, D], got {x.dtype} {tuple(x.shape)}")
    return dispatch.ops.pack_e5m6(x, backend)


def unpack_e5m6(
    high: torch.Tensor,
    low: torch.Tensor,
    scale: torch.Tensor,
    width: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """The values [M, width] of ``dtype`` that ``pack_e5m6`` wrote.

    Raises:
        ValueError: planes and scale that do not fit together.
    """
    rows, groups = scale.shape
    if tuple(high.shape) != (rows, 128 * groups) or tuple(low.shape) != (rows, 64 * groups) or width > 128 * groups:
        raise ValueError(f"planes {tuple(high.shape)}, {tuple(low.shape)} do not fit scale {tuple(scale.shape)}")
    return dispatch.ops.unpack_e5m6(high, low, scale, width, dtype, backend)
