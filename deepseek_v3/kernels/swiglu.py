"""SwiGLU's product, ``silu(gate) * up``, and its gradient, each in one pass over memory. F width."""

from typing import Any

import torch

from . import dispatch
from .quantize import TRITON_DTYPES
from .reference import swiglu as reference

OPERATION = "swiglu"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _fake(gate, up, grad, backend):
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] * (1 if grad is None else 2))


@dispatch.define("swiglu(Tensor gate, Tensor up, Tensor? grad, str backend) -> Tensor", _fake)
def _swiglu(gate, up, grad, backend):
    reasons = _reasons(gate.device)
    if gate.dtype not in TRITON_DTYPES or up.dtype != gate.dtype:
        reasons["triton"] = reasons["triton"] or f"{gate.dtype} and {up.dtype}"
    if dispatch.choose(OPERATION, reasons, backend, gate.device) == "torch":
        given = reference.swiglu(gate, up) if grad is None else reference.swiglu_backward(gate, up, grad)
        return given.contiguous()
    from .triton.swiglu import swiglu as launch

    width = gate.shape[-1]
    gate_rows, up_rows = (_dense(x.reshape(-1, width)) for x in (gate, up))
    out = launch(gate_rows, up_rows, None if grad is None else grad.reshape(-1, width).contiguous())
    return out.view(*gate.shape[:-1], out.shape[-1])


def _dense(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class _SwiGLU(torch.autograd.Function):
    """Keeps what it was given and nothing in float32. Of both side by side the gradient is one tensor, too."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, backend: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return dispatch.ops.swiglu(*_halves(gate, up), None, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        both = dispatch.ops.swiglu(*_halves(gate, up), grad, ctx.backend)
        return (both, None, None) if up is None else (*both.chunk(2, dim=-1), None)


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return gate.chunk(2, dim=-1) if up is None else (gate, up)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, backend: str = "auto") -> torch.Tensor:
    """``silu(gate) * up``, computed in float32 and rounded once. Differentiable, its gradient likewise.

    Args:
        gate: [..., F], floating; without ``up`` [..., 2F], gate and up side by side.
        up: [..., F] of gate's dtype, if not in ``gate``; both strided as halves of one tensor may be.
        backend: "auto", "triton" or "torch".

    Returns:
        [..., F], contiguous.

    Raises:
        ValueError: shapes or dtypes that differ, an odd width of both. RuntimeError: a backend asked for that cannot
            run here.
    """
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"gate and up lie side by side in a tensor of an even width, got {tuple(gate.shape)}")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ValueError(
            f"gate {tuple(gate.shape)} of {gate.dtype} and up {tuple(up.shape)} of {up.dtype} must be of one shape and"
            " dtype"
        )
    return _SwiGLU.apply(gate, up, backend)
