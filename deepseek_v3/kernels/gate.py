"""SwiGLU's gate, ``silu(gate) * up`` of both side by side, in float32 up to its result. P rows, F width."""

import torch

from . import dispatch
from .quantize import TRITON_DTYPES
from .reference import gate as reference

OPERATION = "silu_gate"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _fake(both, grad, backend):
    return both.new_empty(both.shape[0], both.shape[1] // (2 if grad is None else 1))


@dispatch.define("silu_gate(Tensor both, Tensor? grad, str backend) -> Tensor", _fake)
def _gate(both, grad, backend):
    reasons = _reasons(both.device)
    reasons["triton"] = reasons["triton"] or (None if both.dtype in TRITON_DTYPES else f"{both.dtype}")
    if dispatch.choose(OPERATION, reasons, backend, both.device) == "torch":
        return reference.silu_gate(both) if grad is None else reference.silu_gate_backward(both, grad)
    from .triton.gate import silu_gate as launch

    return launch(both.contiguous(), None if grad is None else grad.contiguous())


class _SiluGate(torch.autograd.Function):
    """Keeps what it was given and nothing in float32."""

    @staticmethod
    def forward(ctx, both, backend):
        ctx.save_for_backward(both)
        ctx.backend = backend
        return dispatch.ops.silu_gate(both, None, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return dispatch.ops.silu_gate(ctx.saved_tensors[0], grad, ctx.backend), None


def silu_gate(both: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """``silu(gate) * up``, computed in float32 and rounded once. Differentiable, its gradient likewise.

    Args:
        both: [P, 2F], floating, gate first.
        backend: "auto", "triton" or "torch".

    Returns:
        [P, F] of the dtype of ``both``.

    Raises:
        ValueError: no matrix of an even width. RuntimeError: a backend asked for that cannot run here.
    """
    if both.dim() != 2 or both.shape[1] % 2 or not both.is_floating_point():
        raise ValueError(f"gate and up lie side by side in a floating [P, 2F], got {both.dtype} {tuple(both.shape)}")
    return _SiluGate.apply(both, backend)
