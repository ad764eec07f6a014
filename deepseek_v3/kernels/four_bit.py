"""Matrices in 4 bits, as bitsandbytes packs them, widened: all of a stack or some, in one launch."""

import torch

from . import dispatch
from .quantize import TRITON_DTYPES
from .reference import four_bit as reference

OPERATION = "widen_4bit"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _fake(codes, absmax, table, numbers, nested_absmax, offset, nested_table, chosen, dtype, backend):
    matrices = codes.shape[0] if chosen is None else chosen.shape[0]
    return codes.new_empty(matrices, numbers, dtype=dtype)


@dispatch.define(
    "widen_4bit(Tensor codes, Tensor absmax, Tensor table, SymInt numbers, Tensor? nested_absmax, Tensor? offset,"
    " Tensor? nested_table, Tensor? chosen, ScalarType dtype, str backend) -> Tensor",
    _fake,
)
def _widen(codes, absmax, table, numbers, nested_absmax, offset, nested_table, chosen, dtype, backend):
    reasons = _reasons(codes.device)
    reasons["triton"] = reasons["triton"] or (None if dtype in TRITON_DTYPES else f"{dtype}")
    arguments = (codes, absmax, table, numbers, nested_absmax, offset, nested_table, chosen, dtype)
    if dispatch.choose(OPERATION, reasons, backend, codes.device) == "torch":
        return reference.widen_4bit(*arguments)
    from .triton.launch_four_bit import widen_4bit as launch

    return launch(*(each.contiguous() if isinstance(each, torch.Tensor) else each for each in arguments))


def widen_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    numbers: int,
    *,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    chosen: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """The numbers of matrices that are packed one by one: ``table[code]`` times the maximum of its block.

    Blocks of 64 run over a matrix's rows end to end; the last may be shorter. Products are float32, rounded once.

    Args:
        codes: uint8 [E, ceil(numbers / 2)], two a byte, the first in its high half.
        absmax: [E, B] with B = ceil(numbers / 64): float32, or with ``nested`` uint8 codes.
        table: float32 [16], what a code stands for.
        numbers: in each matrix.
        nested: of maxima that are codes: their factors, float32 [E, ceil(B / 256)]; their mean, float32 [E], which is
            added; what a code stands for, float32 [256].
        chosen: integers [H], the matrices wanted; None for all.
        dtype: of the result.
        backend: "auto", "triton" or "torch"; they agree bit for bit.

    Returns:
        [H or E, numbers].

    Raises:
        ValueError: sizes or dtypes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    blocks = -(-numbers // reference.BLOCK)
    kind = torch.float32 if nested is None else torch.uint8
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != -(-numbers // 2):
        raise ValueError(f"codes must be uint8 [E, {-(-numbers // 2)}], got {codes.dtype} {tuple(codes.shape)}")
    if absmax.dtype != kind or absmax.shape != (codes.shape[0], blocks):
        raise ValueError(f"absmax must be {kind} [E, {blocks}], got {absmax.dtype} {tuple(absmax.shape)}")
    outer = -(-blocks // reference.NESTED_BLOCK)
    if nested is not None and (nested[0].shape != (codes.shape[0], outer) or nested[1].shape != codes.shape[:1]):
        raise ValueError(
            f"nested maxima take factors [E, {outer}] and means [E], got {[tuple(t.shape) for t in nested]}"
        )
    factors, mean, nested_table = nested or (None, None, None)
    return dispatch.ops.widen_4bit(codes, absmax, table, numbers, factors, mean, nested_table, chosen, dtype, backend)
