"""FP8 E4M3 quantisers of the training and checkpoint recipe: 128x128 weights, 1x128 and 128x1 activations.

Every function takes and gives plain tensors; codes are ``torch.float8_e4m3fn``, scales float32, and
``value = code * scale``. Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.3.
"""

import math

import torch

from .reference import quantize as reference
from .reference.quantize import AMAX_FLOOR


def _check_matrix(name: str, tensor: torch.Tensor, dims: int) -> None:
    if tensor.dim() < dims:
        raise ValueError(f"{name} needs at least {dims} dimensions, got shape {tuple(tensor.shape)}")


def _check_floating(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _check_scale(codes: torch.Tensor, scale: torch.Tensor, expected: tuple[int, ...]) -> None:
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes must be torch.float8_e4m3fn, got {codes.dtype}")
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not fit codes of shape {tuple(codes.shape)}, need {expected}"
        )


def quantize_weight(
    w: torch.Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise weights block by block.

    Args:
        w: [..., rows, cols] (leading expert dimensions allowed), float16/bfloat16/float32/float64.
        block: rows and columns that share a scale. A ragged edge counts as padded with zeros.
        scale_fmt: None for ``amax / 448``; ``"ue8m0"`` for the next power of two above it.
        amax_floor: blocks whose largest magnitude is below it are scaled as if it were this much. The default is
            the least one whose scale is a normal float32, so an all-zero block has codes 0 and a scale above 0.

    Returns:
        codes: float8_e4m3fn of w's shape, contiguous.
        scale: float32 [..., ceil(rows / block[0]), ceil(cols / block[1])].
        A block that holds NaN or infinity gets a NaN or infinite scale and NaN codes.

    Raises:
        ValueError: fewer than two dimensions, another dtype, an unknown scale_fmt.
    """
    _check_matrix("w", w, 2)
    _check_floating("w", w)
    reference.check_scale_format(scale_fmt)
    return reference.quantize_weight(w, block, scale_fmt, amax_floor)


def dequantize_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``codes * scale`` by block: a float32 product, rounded once to ``dtype``, as the official converter does.

    Args:
        codes: float8_e4m3fn [..., rows, cols].
        scale: [..., ceil(rows / block[0]), ceil(cols / block[1])], float32 (any floating dtype is widened to it).
        block, dtype: block shape and the dtype of the result.

    Returns:
        [..., rows, cols] of ``dtype``, contiguous.

    Raises:
        ValueError: codes of another dtype, or a scale whose shape does not fit.
    """
    _check_matrix("codes", codes, 2)
    *lead, rows, cols = codes.shape
    _check_scale(codes, scale, (*lead, math.ceil(rows / block[0]), math.ceil(cols / block[1])))
    return reference.dequantize_weight(codes, scale, block, dtype)


def quantize_activation(
    x: torch.Tensor, *, group: int = 128, scale_fmt: str | None = None, amax_floor: float = AMAX_FLOOR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations per token and per ``group`` channels (1x128 tiles).

    Args:
        x: [..., D], float16/bfloat16/float32/float64.
        group, scale_fmt, amax_floor: as in ``quantize_weight``, the group along the last dimension.

    Returns:
        codes: float8_e4m3fn [..., D].
        scale: float32 [..., ceil(D / group)].

    Raises:
        ValueError: no dimension, another dtype, an unknown scale_fmt.
    """
    _check_matrix("x", x, 1)
    _check_floating("x", x)
    reference.check_scale_format(scale_fmt)
    return reference.quantize_activation(x, group, scale_fmt, amax_floor)


def quantize_activation_transposed(
    x: torch.Tensor, *, group: int = 128, scale_fmt: str | None = None, amax_floor: float = AMAX_FLOOR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise per channel and per ``group`` tokens (128x1 tiles), transposed: the operand of a weight gradient.

    Args:
        x: [M, D] with M tokens, float16/bfloat16/float32/float64.
        group, scale_fmt, amax_floor: as in ``quantize_weight``, the group along the tokens.

    Returns:
        codes: float8_e4m3fn [D, M], contiguous.
        scale: float32 [D, ceil(M / group)].

    Raises:
        ValueError: x is no matrix, another dtype, an unknown scale_fmt.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [tokens, channels], got shape {tuple(x.shape)}")
    _check_floating("x", x)
    reference.check_scale_format(scale_fmt)
    codes, scale = reference.quantize_activation(x.t(), group, scale_fmt, amax_floor)
    return codes.contiguous(), scale


def dequantize_activation(
    codes: torch.Tensor, scale: torch.Tensor, *, group: int = 128, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """``codes * scale`` along the last dimension: a float32 product, rounded once to ``dtype``.

    Args:
        codes: float8_e4m3fn [..., D].
        scale: [..., ceil(D / group)], float32.

    Returns:
        [..., D] of ``dtype``. What ``quantize_activation_transposed`` wrote comes back as [D, M].

    Raises:
        ValueError: codes of another dtype, or a scale whose shape does not fit.
    """
    _check_matrix("codes", codes, 1)
    _check_scale(codes, scale, (*codes.shape[:-1], math.ceil(codes.shape[-1] / group)))
    return reference.dequantize_activation(codes, scale, group, dtype)
