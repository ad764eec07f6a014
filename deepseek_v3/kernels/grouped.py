"""Matrix products grouped by expert, over rows sorted by expert. E experts, P rows, N columns, K reduced columns."""

import torch

from . import dispatch
from .reference import experts as reference

OPERATION = "grouped_gemm"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {
        "triton": dispatch.triton_reason(device),
        "grouped_mm": dispatch.cuda_reason(device, (9, 0)),
        "torch": None,
    }


dispatch.OPERATIONS[OPERATION] = _reasons


def _choose(left, right, backend) -> str:
    reasons = _reasons(left.device)
    if not {left.dtype, right.dtype} <= {torch.bfloat16, torch.float16, torch.float32}:
        reasons["triton"] = reasons["triton"] or f"{left.dtype}"
    if (
        not left.dtype == right.dtype == torch.bfloat16
        or left.shape[-1] % 8
        or right.shape[-1] % 8
        or right.shape[-2] % 8
    ):
        reasons["grouped_mm"] = reasons["grouped_mm"] or "takes bfloat16 with sizes that are multiples of 8 alone"
    return dispatch.choose(OPERATION, reasons, backend, left.device)


def _gemm_fake(x, w, offsets, transposed, backend):
    return w.new_empty(x.shape[0], w.shape[2] if transposed else w.shape[1])


@dispatch.define(
    "grouped_gemm(Tensor x, Tensor w, Tensor offsets, bool transposed, str backend) -> Tensor", _gemm_fake
)
def _gemm(x, w, offsets, transposed, backend):
    chosen = _choose(x, w, backend)
    if chosen == "torch":
        return reference.grouped_gemm(x, w, offsets, transposed)
    if chosen == "grouped_mm":
        return torch._grouped_mm(x, w if transposed else w.transpose(1, 2), offs=offsets[1:])
    from .triton.launch_grouped import grouped_gemm as launch

    x, w = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, w))
    return launch(x, w, offsets, transposed)


def _wgrad_fake(dy, x, offsets, dtype, backend):
    return x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1], dtype=dtype)


@dispatch.define(
    "grouped_wgrad(Tensor dy, Tensor x, Tensor offsets, ScalarType dtype, str backend) -> Tensor", _wgrad_fake
)
def _wgrad(dy, x, offsets, dtype, backend):
    chosen = _choose(dy, x, backend)
    if chosen == "torch":
        return reference.grouped_wgrad(dy, x, offsets, dtype)
    if chosen == "grouped_mm":
        return torch._grouped_mm(dy.t(), x, offs=offsets[1:]).to(dtype)
    from .triton.launch_grouped import grouped_wgrad as launch

    dy, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (dy, x))
    return launch(dy, x, offsets, dtype)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets, transposed, backend):
        ctx.save_for_backward(x, w, offsets)
        ctx.transposed, ctx.backend = transposed, backend
        return dispatch.ops.grouped_gemm(x, w, offsets, transposed, backend)

    @staticmethod
    def backward(ctx, dy):
        x, w, offsets = ctx.saved_tensors
        ops, dy = dispatch.ops, dy.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ops.grouped_gemm(dy, w, offsets, not ctx.transposed, ctx.backend).to(x.dtype)
        if ctx.needs_input_grad[1]:
            left, right = (x, dy) if ctx.transposed else (dy, x)
            dw = ops.grouped_wgrad(left, right, offsets, w.dtype, ctx.backend)
        return dx, dw, None, None, None


def _mix(narrow, wide) -> bool:
    return narrow.dtype == wide.dtype or (wide.dtype == torch.float32 and narrow.dtype.itemsize == 2)


def _check(x, offsets, experts) -> None:
    if offsets.dtype != torch.int32 or offsets.shape != (experts + 1,):
        raise ValueError(f"offsets must be int32 [{experts + 1}], got {offsets.dtype} {tuple(offsets.shape)}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"rows must be a floating matrix [P, K], got {x.dtype} {tuple(x.shape)}")


def grouped_gemm(
    x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, *, transposed: bool = False, backend: str = "auto"
) -> torch.Tensor:
    """``y[p] = w[e] @ x[p]`` for each row p of expert e; with ``transposed``, ``w[e].T @ x[p]``. Differentiable.

    Args:
        x: [P, K], rows sorted by expert.
        w: [E, N, K] (transposed: [E, K, N]), the dtype of x, or float32 over rows of 16 bits, which are widened as
            they are read; strided stacks are read in place.
        offsets: int32 [E + 1] on the device, from ``sort_pairs``; read there, never on the host (but by "torch").
        backend: "auto", "triton", "grouped_mm" (torch's, bfloat16 on Hopper) or "torch".

    Returns:
        [P, N] of w's dtype, summed in float32. Rows from ``offsets[E]`` on are left unwritten.

    Raises:
        ValueError: shapes or dtypes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if w.dim() != 3 or not _mix(x, w) or x.shape[-1] != w.shape[1 if transposed else 2]:
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} does not fit w {w.dtype} {tuple(w.shape)}")
    _check(x, offsets, w.shape[0])
    return _GroupedLinear.apply(x, w, offsets, transposed, backend)


def grouped_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """``dw[e] = dy[rows of e].T @ x[rows of e]``; zeros for an expert without rows.

    Args:
        dy: [P, N]; x: [P, K], rows sorted by expert, in one dtype, or one in float32 and the other in 16 bits.
        offsets: int32 [E + 1] from ``sort_pairs``.
        dtype: of the result; float32 keeps what the float32 sum holds.
        backend: as for ``grouped_gemm``.

    Returns:
        [E, N, K] of ``dtype``.

    Raises:
        ValueError: shapes or dtypes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if dy.dim() != 2 or dy.shape[0] != x.shape[0] or not (_mix(dy, x) or _mix(x, dy)):
        raise ValueError(f"dy {dy.dtype} {tuple(dy.shape)} does not fit x {x.dtype} {tuple(x.shape)}")
    _check(x, offsets, offsets.numel() - 1)
    return dispatch.ops.grouped_wgrad(dy, x, offsets, dtype, backend)
