"""SwiGLU's product, ``silu(gate) * up``, in one pass over memory."""

import torch
import torch.nn.functional as F

from . import dispatch
from .norm import TRITON_DTYPES

OPERATION = "swiglu"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


@dispatch.define(
    "swiglu(Tensor gate, Tensor up, str backend) -> Tensor", lambda gate, up, backend: gate.new_empty(gate.shape)
)
def _swiglu(gate, up, backend):
    reasons = _reasons(gate.device)
    if gate.dtype not in TRITON_DTYPES or up.dtype != gate.dtype:
        reasons["triton"] = reasons["triton"] or f"{gate.dtype} and {up.dtype}"
    if dispatch.choose(OPERATION, reasons, backend, gate.device) == "torch":
        return (F.silu(gate) * up).contiguous()
    from .triton.launch_swiglu import swiglu as launch

    rows = [x.reshape(-1, x.shape[-1]) for x in (gate, up)]
    return launch(*(x if x.stride(-1) == 1 else x.contiguous() for x in rows)).view(gate.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """``silu(gate) * up``, the silu rounded to the dtype as torch's is. Differentiable, on the torch path.

    Args:
        gate, up: [..., F] of one dtype, strided as halves of one tensor may be.
        backend: "auto", "triton" or "torch".

    Returns:
        [..., F], contiguous where no gradient is wanted.

    Raises:
        ValueError: shapes that differ. RuntimeError: a backend asked for that cannot run here.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must be of one shape")
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        if dispatch.requested(OPERATION, backend)[0] not in ("auto", "torch"):
            raise RuntimeError(f"{OPERATION} on {backend!r} has no gradient; use backend='torch' or torch.no_grad()")
        return F.silu(gate) * up
    return dispatch.ops.swiglu(gate, up, backend)
