"""FP8 E4M3 quantisers of the training and checkpoint recipe: 128x128 weights, 1x128 and 128x1 activations.

Every function takes and gives plain tensors; codes are ``torch.float8_e4m3fn``, scales float32, and
``value = code * scale``. Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.3.
"""

import math

import torch

from . import dispatch
from .reference import quantize as reference
from .reference.quantize import AMAX_FLOOR

OPERATION = "quantize"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device, (8, 9)), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _is_triton(x: torch.Tensor, backend: str, reason: str | None = None) -> bool:
    reasons = _reasons(x.device)
    reason = (
        reason or (None if x.dtype in TRITON_DTYPES else f"{x.dtype}") or (None if x.numel() else "an empty tensor")
    )
    reasons["triton"] = reasons["triton"] or reason
    return dispatch.choose(OPERATION, reasons, backend, x.device) == "triton"


def _weight_fake(w, height, width, scale_fmt, amax_floor, backend):
    blocks = ((w.shape[-2] + height - 1) // height, (w.shape[-1] + width - 1) // width)
    codes = w.new_empty(w.shape, dtype=torch.float8_e4m3fn)
    return codes, w.new_empty(*w.shape[:-2], *blocks, dtype=torch.float32)


@dispatch.define(
    "quantize_weight(Tensor w, int height, int width, str? scale_fmt, float amax_floor, str backend)"
    " -> (Tensor, Tensor)",
    _weight_fake,
)
def _weight(w, height, width, scale_fmt, amax_floor, backend):
    odd = None if height & (height - 1) == 0 == width & (width - 1) else "block sides that are no powers of two"
    # Leading dimensions that do not merge into one would need a copy of the whole stack.
    merge = w.dim() <= 3 or w.is_contiguous()
    if not _is_triton(w, backend, odd or (None if merge else "a strided stack of more than three dimensions")):
        return reference.quantize_weight(w, (height, width), scale_fmt, amax_floor)
    from .triton.launch_fp8 import quantize_weight as launch

    codes, scale = launch(w.reshape(-1, *w.shape[-2:]), (height, width), scale_fmt, amax_floor)
    return codes.view(w.shape), scale.view(*w.shape[:-2], *scale.shape[1:])


def _activation_fake(x, up, group, scale_fmt, amax_floor, backend):
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    groups = (x.shape[-1] + group - 1) // group
    return codes, x.new_empty(groups, x.numel() // max(x.shape[-1], 1), dtype=torch.float32)


@dispatch.define(
    "quantize_activation(Tensor x, Tensor? up, int group, str? scale_fmt, float amax_floor, str backend)"
    " -> (Tensor, Tensor)",
    _activation_fake,
)
def _activation(x, up, group, scale_fmt, amax_floor, backend):
    """Codes and the scales stored by group, [groups, rows]: an operation's result has dense strides."""
    if not _is_triton(x, backend):
        if up is not None:
            x = (x.float() * x.float().sigmoid() * up.float()).to(x.dtype)
        codes, scale = reference.quantize_activation(x, group, scale_fmt, amax_floor)
        return codes.contiguous(), scale.reshape(-1, scale.shape[-1]).t().contiguous()
    from .triton.launch_fp8 import quantize_activation as launch

    rows = x.reshape(-1, x.shape[-1])
    second = None if up is None else up.reshape(rows.shape)
    if rows.stride(-1) != 1 or (second is not None and second.stride() != rows.stride()):
        rows, second = rows.contiguous(), None if second is None else second.contiguous()
    codes, scale = launch(rows, group, scale_fmt, amax_floor, second)
    return codes.view(x.shape), scale.t()


def _transposed_fake(x, group, scale_fmt, amax_floor, backend):
    codes = x.new_empty(x.shape[1], x.shape[0], dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(x.shape[1], (x.shape[0] + group - 1) // group, dtype=torch.float32)


@dispatch.define(
    "quantize_activation_transposed(Tensor x, int group, str? scale_fmt, float amax_floor, str backend)"
    " -> (Tensor, Tensor)",
    _transposed_fake,
)
def _transposed(x, group, scale_fmt, amax_floor, backend):
    if not _is_triton(x, backend):
        codes, scale = reference.quantize_activation(x.t(), group, scale_fmt, amax_floor)
        return codes.contiguous(), scale.contiguous()
    from .triton.launch_fp8 import quantize_transposed as launch

    return launch(x if x.stride(-1) == 1 else x.contiguous(), None, group, scale_fmt, amax_floor)


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
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise weights block by block.

    Args:
        w: [..., rows, cols] (leading expert dimensions allowed), float16/bfloat16/float32/float64.
        block: rows and columns that share a scale. A ragged edge counts as padded with zeros.
        scale_fmt: None for ``amax / 448``; ``"ue8m0"`` for the next power of two above it.
        amax_floor: blocks whose largest magnitude is below it are scaled as if it were this much. The default is
            the least one whose scale is a normal float32, so an all-zero block has codes 0 and a scale above 0.
        backend: "auto", "triton" or "torch"; they agree bit for bit.

    Returns:
        codes: float8_e4m3fn of w's shape, contiguous.
        scale: float32 [..., ceil(rows / block[0]), ceil(cols / block[1])].
        A block that holds NaN or infinity gets a NaN or infinite scale and NaN codes.

    Raises:
        ValueError: fewer than two dimensions, another dtype, an unknown scale_fmt or backend.
        RuntimeError: a backend asked for that cannot run here.
    """
    _check_matrix("w", w, 2)
    _check_floating("w", w)
    reference.check_scale_format(scale_fmt)
    return dispatch.ops.quantize_weight(w, *block, scale_fmt, amax_floor, backend)


@dispatch.define(
    "transpose_codes(Tensor codes, str backend) -> Tensor",
    lambda codes, backend: codes.new_empty(*codes.shape[:-2], codes.shape[-1], codes.shape[-2]),
)
def _transpose(codes, backend):
    merge = codes.stride(-1) == 1 and (codes.dim() <= 3 or codes.is_contiguous())
    reasons = _reasons(codes.device)
    if not merge or not codes.numel():
        reasons["triton"] = reasons["triton"] or "rows that are not dense, or an empty tensor"
    if dispatch.choose(OPERATION, reasons, backend, codes.device) == "torch":
        return codes.view(torch.uint8).transpose(-1, -2).contiguous().view(codes.dtype)
    from .triton.launch_fp8 import transpose_codes as launch

    turned = launch(codes.reshape(-1, *codes.shape[-2:]))
    return turned.view(*codes.shape[:-2], *turned.shape[1:])


def transpose_codes(codes: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Codes with their last two dimensions exchanged, as the gradient to a linear's input multiplies by them.

    128 x 128 blocks stay blocks: the scales that go with the result are those of the codes, transposed.

    Args:
        codes: float8_e4m3fn [..., N, K].
        backend: "auto", "triton" or "torch"; they agree bit for bit.

    Returns:
        float8_e4m3fn [..., K, N], contiguous.

    Raises:
        ValueError: fewer than two dimensions, or another dtype.
        RuntimeError: a backend asked for that cannot run here.
    """
    _check_matrix("codes", codes, 2)
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes must be float8_e4m3fn, got {codes.dtype}")
    return dispatch.ops.transpose_codes(codes, backend)


@dispatch.define(
    "dequantize_weight(Tensor codes, Tensor scale, int height, int width, ScalarType dtype, str backend) -> Tensor",
    lambda codes, scale, height, width, dtype, backend: codes.new_empty(codes.shape, dtype=dtype),
)
def _dequantize(codes, scale, height, width, dtype, backend):
    power = height & (height - 1) == 0 == width & (width - 1)
    merge = codes.stride(-1) == 1 and (codes.dim() <= 3 or codes.is_contiguous() and scale.is_contiguous())
    reasons = _reasons(codes.device)
    if not (power and merge and codes.numel() and dtype in TRITON_DTYPES):
        reasons["triton"] = reasons["triton"] or f"odd blocks, {dtype}, rows that are not dense, or an empty tensor"
    if dispatch.choose(OPERATION, reasons, backend, codes.device) == "torch":
        return reference.dequantize_weight(codes, scale, (height, width), dtype)
    from .triton.launch_fp8 import dequantize_weight as launch

    wide = launch(codes.reshape(-1, *codes.shape[-2:]), scale.reshape(-1, *scale.shape[-2:]), (height, width), dtype)
    return wide.view(codes.shape)


def dequantize_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """``codes * scale`` by block: a float32 product, rounded once to ``dtype``, as the official converter does.

    Args:
        codes: float8_e4m3fn [..., rows, cols].
        scale: [..., ceil(rows / block[0]), ceil(cols / block[1])], float32 (any floating dtype is widened to it).
        block, dtype: block shape and the dtype of the result.
        backend: "auto", "triton" or "torch"; they agree bit for bit.

    Returns:
        [..., rows, cols] of ``dtype``, contiguous.

    Raises:
        ValueError: codes of another dtype, or a scale whose shape does not fit.
        RuntimeError: a backend asked for that cannot run here.
    """
    _check_matrix("codes", codes, 2)
    *lead, rows, cols = codes.shape
    _check_scale(codes, scale, (*lead, math.ceil(rows / block[0]), math.ceil(cols / block[1])))
    return dispatch.ops.dequantize_weight(codes, scale, *block, dtype, backend)


def quantize_activation(
    x: torch.Tensor,
    *,
    group: int = 128,
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations per token and per ``group`` channels (1x128 tiles).

    Args:
        x: [..., D], float16/bfloat16/float32/float64.
        group, scale_fmt, amax_floor, backend: as in ``quantize_weight``, the group along the last dimension.

    Returns:
        codes: float8_e4m3fn [..., D].
        scale: float32 [..., ceil(D / group)], a view: it is stored by group, as the products read it.

    Raises:
        ValueError: no dimension, another dtype, an unknown scale_fmt.
    """
    _check_matrix("x", x, 1)
    _check_floating("x", x)
    reference.check_scale_format(scale_fmt)
    return _with_scale_view(dispatch.ops.quantize_activation(x, None, group, scale_fmt, amax_floor, backend))


def _with_scale_view(result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = result
    return codes, scale.t().unflatten(0, codes.shape[:-1]) if codes.dim() > 1 else scale[:, 0]


def quantize_swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    group: int = 128,
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_activation(silu(gate) * up)`` in one pass; the product is rounded to gate's dtype before it.

    Args:
        gate, up: [..., F], one floating dtype; the halves of one tensor are read in place.
        group, scale_fmt, amax_floor, backend: as in ``quantize_activation``.

    Returns:
        codes: float8_e4m3fn [..., F]. scale: float32 [..., ceil(F / group)], stored by group.

    Raises:
        ValueError: shapes or dtypes that differ, an unknown scale_fmt.
    """
    _check_floating("gate", gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} differ")
    reference.check_scale_format(scale_fmt)
    return _with_scale_view(dispatch.ops.quantize_activation(gate, up, group, scale_fmt, amax_floor, backend))


def quantize_activation_transposed(
    x: torch.Tensor,
    *,
    group: int = 128,
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise per channel and per ``group`` tokens (128x1 tiles), transposed: the operand of a weight gradient.

    Args:
        x: [M, D] with M tokens, float16/bfloat16/float32/float64.
        group, scale_fmt, amax_floor, backend: as in ``quantize_weight``, the group along the tokens.

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
    return dispatch.ops.quantize_activation_transposed(x, group, scale_fmt, amax_floor, backend)


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
