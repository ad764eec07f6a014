"""Steps of FP8 training between its products: kept codes to 128 x 1 tiles, SwiGLU's backward from kept codes.

M rows, P rows sorted by expert, D columns, E experts, F expert width. Source: DeepSeek-V3 report, sections 3.3 and
3.5.2.
"""

import math

import torch

from . import dispatch
from .fp8 import FP8_CARD
from .quantize import TRITON_DTYPES
from .reference import fp8_training as reference
from .reference.quantize import AMAX_FLOOR, check_scale_format

OPERATION = "fp8_training"
Pair = tuple[torch.Tensor, torch.Tensor]


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device, FP8_CARD), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _is_triton(x: torch.Tensor, reason: str | None, backend: str) -> bool:
    reasons = _reasons(x.device)
    reasons["triton"] = reasons["triton"] or reason
    return dispatch.choose(OPERATION, reasons, backend, x.device) == "triton"


def _retile_fake(x, scale, rows, offsets, scale_fmt, amax_floor, backend):
    count = x.shape[0] if rows is None else rows.shape[0]
    groups = (count + 127) // 128 if offsets is None else count // 128 + offsets.shape[0] - 1
    codes = x.new_empty(x.shape[1], count if offsets is None else groups * 128, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(groups, x.shape[1], dtype=torch.float32).t()


@dispatch.define(
    "retile(Tensor x, Tensor? scale, Tensor? rows, Tensor? offsets, str? scale_fmt, float amax_floor, str backend)"
    " -> (Tensor, Tensor)",
    _retile_fake,
)
def _retile(x, scale, rows, offsets, scale_fmt, amax_floor, backend):
    odd = None if scale is not None or x.dtype in TRITON_DTYPES else f"{x.dtype}"
    if not _is_triton(x, odd, backend):
        return reference.retile(x, scale, rows, offsets, scale_fmt, amax_floor)
    from .triton.launch_fp8_training import retile as launch

    return launch(x if x.stride(-1) == 1 else x.contiguous(), scale, rows, offsets, scale_fmt, amax_floor)


def retile(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Operand of a weight gradient from what was kept: dequantised, gathered, transposed, quantised in 128 x 1 tiles.

    Args:
        x: codes float8_e4m3fn [M, D] with their scale, or values [M, D] of a floating dtype without.
        scale: float32 [M, ceil(D / 128)], any strides.
        rows: int32 [P], the row of x that each row of the operand is; all in order where None.
        offsets: int32 [E + 1] from ``sort_pairs``: each expert's rows start a tile of their own.
        scale_fmt, amax_floor: as for ``quantize_weight``. backend: "auto", "triton" or "torch".

    Returns:
        codes: float8_e4m3fn [D, P]; with offsets [D, 128 G] with G = P // 128 + E, for ``grouped_fp8_wgrad``.
        scale: float32 [D, ceil(P / 128)], stored by group; with offsets [D, G]. What lies past the last expert's
            last tile is left unwritten, in codes and scale.

    Raises:
        ValueError: dtypes or shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if x.dim() != 2 or (scale is None) != (x.dtype.itemsize > 1) or not x.is_floating_point():
        raise ValueError(f"x must be values [M, D], or FP8 codes with a scale, got {x.dtype} {tuple(x.shape)}")
    if scale is not None and tuple(scale.shape) != (x.shape[0], math.ceil(x.shape[1] / 128)):
        raise ValueError(f"scale {tuple(scale.shape)} does not fit codes {tuple(x.shape)}")
    for name, index in (("rows", rows), ("offsets", offsets)):
        if index is not None and (index.dtype != torch.int32 or index.dim() != 1):
            raise ValueError(f"{name} must be a row of int32, got {index.dtype} {tuple(index.shape)}")
    check_scale_format(scale_fmt)
    return dispatch.ops.retile(x, scale, rows, offsets, scale_fmt, amax_floor, backend)


def _both_fake(x, scale_fmt, amax_floor, backend):
    rows, width = x.shape
    codes, scale = _retile_fake(x, None, None, None, scale_fmt, amax_floor, backend)
    along = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return along, x.new_empty((width + 127) // 128, rows, dtype=torch.float32).t(), codes, scale


@dispatch.define(
    "quantize_both(Tensor x, str? scale_fmt, float amax_floor, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _both_fake,
)
def _both(x, scale_fmt, amax_floor, backend):
    odd = None if x.dtype in TRITON_DTYPES else f"{x.dtype}"
    if not _is_triton(x, odd, backend):
        return reference.quantize_both(x, scale_fmt, amax_floor)
    from .triton.launch_fp8_training import quantize_both as launch

    return launch(x if x.stride(-1) == 1 else x.contiguous(), scale_fmt, amax_floor)


def quantize_both(
    x: torch.Tensor,
    *,
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(*quantize_activation(x), *retile(x))`` with x read once: what a gradient's two products take.

    Args:
        x: [M, D], float16/bfloat16/float32/float64.
        scale_fmt, amax_floor: as for ``quantize_weight``. backend: "auto", "triton" or "torch".

    Returns:
        codes float8_e4m3fn [M, D], scale float32 [M, ceil(D / 128)]; codes [D, M], scale [D, ceil(M / 128)]; the
        scales are stored by group.

    Raises:
        ValueError: another shape or dtype. RuntimeError: a backend asked for that cannot run here.
    """
    if x.dim() != 2 or not x.is_floating_point() or x.dtype.itemsize < 2:
        raise ValueError(f"x must be a floating matrix [M, D], got {x.dtype} {tuple(x.shape)}")
    check_scale_format(scale_fmt)
    return dispatch.ops.quantize_both(x, scale_fmt, amax_floor, backend)


def _forward_fake(gate_up, scale_fmt, amax_floor, backend):
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2

    def pair(width):
        codes = gate_up.new_empty(rows, width, dtype=torch.float8_e4m3fn)
        return codes, gate_up.new_empty((width + 127) // 128, rows, dtype=torch.float32).t()

    return *pair(width), *pair(2 * width)


@dispatch.define(
    "swiglu_forward_codes(Tensor gate_up, str? scale_fmt, float amax_floor, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(gate_up, scale_fmt, amax_floor, backend):
    odd = None if gate_up.dtype in TRITON_DTYPES else f"{gate_up.dtype}"
    if gate_up.shape[1] % 256:
        odd = odd or "a width that 128 does not divide"
    if not _is_triton(gate_up, odd, backend):
        return reference.swiglu_forward_codes(gate_up, scale_fmt, amax_floor)
    from .triton.launch_fp8_training import swiglu_forward_codes as launch

    return launch(gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous(), scale_fmt, amax_floor)


def swiglu_forward_codes(
    gate_up: torch.Tensor, *, scale_fmt: str | None = None, amax_floor: float = AMAX_FLOOR, backend: str = "auto"
) -> tuple[Pair, Pair]:
    """``quantize_swiglu`` of the two halves and ``quantize_activation`` of both, of one read.

    Args:
        gate_up: [P, 2F], float16/bfloat16/float32/float64, gate first.
        scale_fmt, amax_floor: as for ``quantize_weight``. backend: "auto", "triton" or "torch".

    Returns:
        Codes [P, F] and scale [P, ceil(F / 128)] of silu(gate) * up, rounded to gate_up's dtype before; codes [P, 2F]
        and scale of gate_up. Scales are stored by group.

    Raises:
        ValueError: another shape or dtype. RuntimeError: a backend asked for that cannot run here.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_floating_point() or gate_up.dtype.itemsize < 2:
        raise ValueError(f"gate_up must be a floating matrix [P, 2F], got {gate_up.dtype} {tuple(gate_up.shape)}")
    check_scale_format(scale_fmt)
    codes, scale, kept, kept_scale = dispatch.ops.swiglu_forward_codes(gate_up, scale_fmt, amax_floor, backend)
    return (codes, scale), (kept, kept_scale)


def _check_swiglu(
    gate_up: torch.Tensor, scale: torch.Tensor | None, grad: torch.Tensor, weights: torch.Tensor | None
) -> None:
    if grad.dim() != 2 or tuple(gate_up.shape) != (grad.shape[0], 2 * grad.shape[1]):
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must be twice as wide as grad {tuple(grad.shape)}")
    if (scale is None) != (gate_up.dtype.itemsize > 1) or (
        scale is not None and tuple(scale.shape) != (grad.shape[0], math.ceil(gate_up.shape[1] / 128))
    ):
        raise ValueError("FP8 codes need a scale [P, ceil(2F / 128)], values none")
    if weights is not None and tuple(weights.shape) != (grad.shape[0],):
        raise ValueError(f"weights {tuple(weights.shape)} must be [{grad.shape[0]}]")


def _swiglu_fake(gate_up, scale, grad, weights, backend):
    share = grad.new_empty(grad.shape[0], dtype=torch.float32)
    return grad.new_empty(grad.shape[0], 2 * grad.shape[1]), torch.empty_like(grad), share


@dispatch.define(
    "swiglu_backward(Tensor gate_up, Tensor? scale, Tensor grad, Tensor? weights, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _swiglu_fake,
)
def _swiglu(gate_up, scale, grad, weights, backend):
    odd = None if grad.dtype in TRITON_DTYPES else f"{grad.dtype}"
    if scale is not None and grad.shape[1] % 128:
        odd = odd or "a width that 128 does not divide"
    if not _is_triton(grad, odd, backend):
        return reference.swiglu_backward(gate_up, scale, grad, weights)
    from .triton.launch_fp8_training import swiglu_backward as launch

    gate_up = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    return launch(gate_up, scale, grad.contiguous(), None if weights is None else weights.contiguous())


def swiglu_backward(
    gate_up: torch.Tensor,
    scale: torch.Tensor | None,
    grad: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of ``h = silu(gate) * up`` whose rows were weighted after the next product, with h computed again.

    Args:
        gate_up: codes [P, 2F] with their scale float32 [P, ceil(2F / 128)], or values [P, 2F] without; gate first.
        grad: [P, F], gradient to h before the weights.
        weights: floating [P] that multiply each row, or None.

    Returns:
        [P, 2F], gradient to gate_up with the weights in it, of grad's dtype; ``weights * h`` [P, F] of that dtype;
        the weights' gradient, float32 [P].

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    _check_swiglu(gate_up, scale, grad, weights)
    return dispatch.ops.swiglu_backward(gate_up, scale, grad, weights, backend)


def _swiglu_codes_fake(gate_up, scale, grad, weights, offsets, scale_fmt, amax_floor, backend):
    (rows, width), experts = grad.shape, None if offsets is None else offsets.shape[0] - 1
    groups = (rows + 127) // 128 if experts is None else rows // 128 + experts
    padded = rows if experts is None else groups * 128

    def pair(codes_shape, groups):
        codes = grad.new_empty(codes_shape, dtype=torch.float8_e4m3fn)
        return codes, grad.new_empty(groups, codes_shape[0], dtype=torch.float32).t()

    along = pair((rows, 2 * width), (2 * width + 127) // 128)
    share = grad.new_empty(rows, dtype=torch.float32)
    return *along, *pair((2 * width, padded), groups), *pair((width, padded), groups), share


@dispatch.define(
    "swiglu_backward_codes(Tensor gate_up, Tensor? scale, Tensor grad, Tensor? weights, Tensor? offsets,"
    " str? scale_fmt, float amax_floor, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _swiglu_codes_fake,
)
def _swiglu_codes(gate_up, scale, grad, weights, offsets, scale_fmt, amax_floor, backend):
    odd = None if grad.dtype in TRITON_DTYPES else f"{grad.dtype}"
    if grad.shape[1] % 128:
        odd = odd or "a width that 128 does not divide"
    if not _is_triton(grad, odd, backend):
        return reference.swiglu_backward_codes(gate_up, scale, grad, weights, offsets, scale_fmt, amax_floor)
    from .triton.launch_fp8_training import swiglu_backward_codes as launch

    gate_up = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    weights = None if weights is None else weights.contiguous()
    return launch(gate_up, scale, grad.contiguous(), weights, offsets, scale_fmt, amax_floor)


def swiglu_backward_codes(
    gate_up: torch.Tensor,
    scale: torch.Tensor | None,
    grad: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    offsets: torch.Tensor | None = None,
    scale_fmt: str | None = None,
    amax_floor: float = AMAX_FLOOR,
    backend: str = "auto",
) -> tuple[Pair, Pair, Pair, torch.Tensor]:
    """``swiglu_backward`` whose results go into products alone: as their codes, and never as numbers in memory, so
    that nothing rounds them to grad's dtype before.

    Args:
        gate_up, scale, grad, weights: as for ``swiglu_backward``.
        offsets, scale_fmt, amax_floor: as for ``retile``. backend: "auto", "triton" or "torch".

    Returns:
        Of the gradient to gate_up ``quantize_activation`` and ``retile``, of ``weights * h`` ``retile``, each codes
        and scale; the weights' gradient, float32 [P], where there are weights. Rows past the last expert's are left
        unwritten.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    _check_swiglu(gate_up, scale, grad, weights)
    check_scale_format(scale_fmt)
    given = gate_up, scale, grad, weights, offsets, scale_fmt, amax_floor, backend
    *pairs, share = dispatch.ops.swiglu_backward_codes(*given)
    return (pairs[0], pairs[1]), (pairs[2], pairs[3]), (pairs[4], pairs[5]), share
