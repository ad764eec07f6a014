"""FP8 products grouped by expert: forward and input gradient, and the weight gradient with its quantiser.

P rows sorted by expert, E experts, N columns, K reduced columns; codes are ``torch.float8_e4m3fn``, scales float32.
Source: DeepSeek-V3 report, section 3.3. Where each expert's rows begin is read on the device.
"""

import math

import torch

from . import dispatch
from .fp8 import FP8_CARD, OUT_DTYPES, check_operand
from .reference import fp8 as reference
from .reference.quantize import AMAX_FLOOR, check_scale_format

OPERATION = "grouped_fp8_gemm"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device, FP8_CARD), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _grouped_fake(x, x_scale, w, w_scale, offsets, out_dtype, backend):
    return x.new_empty(x.shape[0], w.shape[1], dtype=out_dtype)


@dispatch.define(
    "grouped_fp8_gemm(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor offsets, ScalarType out_dtype,"
    " str backend) -> Tensor",
    _grouped_fake,
)
def _grouped(x, x_scale, w, w_scale, offsets, out_dtype, backend):
    chosen = dispatch.choose(OPERATION, _reasons(x.device), backend, x.device)
    if chosen == "torch":
        return reference.grouped_fp8_gemm(x, x_scale, w, w_scale, offsets, out_dtype)
    from .triton.launch_grouped import grouped_gemm as launch

    return launch(x.contiguous(), w.contiguous(), offsets, False, out_dtype, x_scale, w_scale.contiguous())


def grouped_fp8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """``y[p] = w[e] @ x[p]`` for the rows p of expert e, in FP8.

    Args:
        x: float8_e4m3fn [P, K], rows sorted by expert; x_scale: float32 [P, ceil(K / 128)], any strides.
        w: float8_e4m3fn [E, N, K]; w_scale: float32 [E, ceil(N / 128), ceil(K / 128)]. For the input gradient hand
            in the transposed codes and scales: 128 x 128 blocks stay blocks.
        offsets: int32 [E + 1] on the device, from ``sort_pairs``.
        out_dtype: bfloat16, float16 or float32.
        backend: "auto", "triton" or "torch" (reads offsets on the host).

    Returns:
        [P, N] of out_dtype; rows from ``offsets[E]`` on are left unwritten.

    Raises:
        ValueError: dtypes or shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[2] or out_dtype not in OUT_DTYPES:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)} must be [P, K] and [E, N, K]; {out_dtype}")
    groups = math.ceil(x.shape[1] / 128)
    check_operand("x", x, x_scale, ((x.shape[0], groups),))
    check_operand("w", w, w_scale, ((w.shape[0], math.ceil(w.shape[1] / 128), groups),))
    if offsets.dtype != torch.int32 or offsets.shape != (w.shape[0] + 1,):
        raise ValueError(f"offsets must be int32 [{w.shape[0] + 1}], got {offsets.dtype} {tuple(offsets.shape)}")
    return dispatch.ops.grouped_fp8_gemm(x, x_scale, w, w_scale, offsets, out_dtype, backend)


def _transpose_fake(x, offsets, scale_fmt, amax_floor, backend):
    groups = x.shape[0] // 128 + offsets.shape[0] - 1
    return (
        x.new_empty(x.shape[1], groups * 128, dtype=torch.float8_e4m3fn),
        x.new_empty(groups, x.shape[1], dtype=torch.float32).t(),
    )


@dispatch.define(
    "quantize_grouped_transposed(Tensor x, Tensor offsets, str? scale_fmt, float amax_floor, str backend)"
    " -> (Tensor, Tensor)",
    _transpose_fake,
)
def _quantize_transposed(x, offsets, scale_fmt, amax_floor, backend):
    if dispatch.choose(OPERATION, _reasons(x.device), backend, x.device) == "torch":
        return reference.quantize_grouped_transposed(x, offsets, scale_fmt, amax_floor)
    from .triton.launch_fp8 import quantize_transposed as launch

    return launch(x if x.stride(-1) == 1 else x.contiguous(), offsets, 128, scale_fmt, amax_floor)


def quantize_grouped_transposed(
    x: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """128 x 1 tiles along the rows, transposed, each expert's rows starting a tile: for ``grouped_fp8_wgrad``.

    Args:
        x: [P, D], rows sorted by expert; offsets: int32 [E + 1] from ``sort_pairs``.
        scale_fmt, amax_floor: as for ``quantize_weight``. backend: "auto", "triton" or "torch".

    Returns:
        codes: float8_e4m3fn [D, 128 G] with G = P // 128 + E; an expert's last tile is filled up with zeros, and what
            lies past the last expert's is left unwritten.
        scale: float32 [D, G], stored by group.
    """
    if x.dim() != 2 or not x.is_floating_point() or offsets.dtype != torch.int32 or offsets.dim() != 1:
        raise ValueError(f"x must be a floating matrix and offsets int32 [E + 1], got {x.dtype} {tuple(x.shape)}")
    check_scale_format(scale_fmt)
    return dispatch.ops.quantize_grouped_transposed(x, offsets, scale_fmt, amax_floor, backend)


def _grouped_wgrad_fake(dy, dy_scale, x, x_scale, offsets, dtype, backend):
    return x.new_empty(offsets.shape[0] - 1, dy.shape[0], x.shape[0], dtype=dtype)


@dispatch.define(
    "grouped_fp8_wgrad(Tensor dy, Tensor dy_scale, Tensor x, Tensor x_scale, Tensor offsets, ScalarType dtype,"
    " str backend) -> Tensor",
    _grouped_wgrad_fake,
)
def _grouped_wgrad(dy, dy_scale, x, x_scale, offsets, dtype, backend):
    chosen = dispatch.choose(OPERATION, _reasons(x.device), backend, x.device)
    if chosen == "torch":
        return reference.grouped_fp8_wgrad(dy, dy_scale, x, x_scale, offsets, dtype)
    from .triton.launch_fp8 import grouped_fp8_wgrad as launch

    return launch(dy.contiguous(), dy_scale, x.contiguous(), x_scale, offsets, dtype)


def grouped_fp8_wgrad(
    dy: torch.Tensor,
    dy_scale: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """``dw[e] = dy[rows of e].T @ x[rows of e]`` in FP8; zeros for an expert without rows.

    Args:
        dy, dy_scale: from ``quantize_grouped_transposed`` of [P, N]; x, x_scale: of [P, K]; the same offsets.
        offsets: int32 [E + 1]. dtype: of the result. backend: "auto", "triton" or "torch".

    Returns:
        [E, N, K] of ``dtype``.

    Raises:
        ValueError: dtypes or shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    groups = dy_scale.shape[-1]
    check_operand("dy", dy, dy_scale, ((dy.shape[0], groups),))
    check_operand("x", x, x_scale, ((x.shape[0], groups),))
    if dy.shape[1] != groups * 128 or x.shape[1] != groups * 128 or dtype not in OUT_DTYPES:
        raise ValueError(f"dy {tuple(dy.shape)} and x {tuple(x.shape)} must have {groups * 128} columns; {dtype}")
    return dispatch.ops.grouped_fp8_wgrad(dy, dy_scale, x, x_scale, offsets, dtype, backend)
