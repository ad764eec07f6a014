"""Queries, keys and values of expanded attention from the up-projections: one launch instead of rotations, copies and
concatenations, and one in the backward.

B batch, T query tokens, S key tokens, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim. Source:
DeepSeek-V2 report (arXiv 2405.04434), section 2.1. Torch's concatenation of head slices reaches a tenth of the memory
bandwidth.
"""

import torch
from torch.autograd.function import once_differentiable

from . import dispatch
from .norm import TRITON_DTYPES
from .reference import heads as reference

OPERATION = "heads"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _is_triton(backend: str, *tensors: torch.Tensor) -> bool:
    reasons, dtype = _reasons(tensors[0].device), tensors[0].dtype
    if dtype not in TRITON_DTYPES or any(x.dtype != dtype for x in tensors):
        reasons["triton"] = reasons["triton"] or f"{', '.join(str(x.dtype) for x in tensors)}"
    return dispatch.choose(OPERATION, reasons, backend, tensors[0].device) == "triton"


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos: torch.Tensor, sin: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)


@dispatch.define(
    "rotate_queries(Tensor q, Tensor cos, Tensor sin, bool interleave, bool back, str backend) -> Tensor",
    lambda q, cos, sin, interleave, back, backend: q.new_empty(q.shape),
)
def _rotate(q, cos, sin, interleave, back, backend):
    if not _is_triton(backend, q):
        run = reference.rotate_queries_backward if back else reference.rotate_queries
        return run(q, cos, sin, interleave)
    from .triton.launch_heads import rotate_queries as launch

    return launch(_dense(q), *_angles(cos, sin, q.shape[0]), interleave, back)


@dispatch.define(
    "rotate_queries_(Tensor(a!) q, Tensor cos, Tensor sin, bool interleave, str backend) -> ()",
    lambda *arguments: None,
)
def _rotate_in_place(q, cos, sin, interleave, backend):
    if not _is_triton(backend, q):
        q.copy_(reference.rotate_queries(q, cos, sin, interleave))
        return
    from .triton.launch_heads import rotate_queries_ as launch

    launch(q, *_angles(cos, sin, q.shape[0]), interleave)


def _join_fake(kv, rope, nope, backend):
    batch, tokens, heads, width = kv.shape
    return (
        kv.new_empty(batch, tokens, heads, nope + rope.shape[2]),
        kv.new_empty(batch, tokens, heads, width - nope),
    )


@dispatch.define("join_keys(Tensor kv, Tensor rope, int nope, str backend) -> (Tensor, Tensor)", _join_fake)
def _join(kv, rope, nope, backend):
    if not _is_triton(backend, kv, rope):
        return reference.join_keys(kv, rope, nope)
    from .triton.launch_heads import join_keys as launch

    return launch(_dense(kv), _dense(rope), nope)


def _split_fake(grad_k, grad_v, nope, backend):
    batch, tokens, heads, width = grad_k.shape
    return (
        grad_k.new_empty(batch, tokens, heads, nope + grad_v.shape[3]),
        grad_k.new_empty(batch, tokens, width - nope),
    )


@dispatch.define(
    "join_keys_backward(Tensor grad_k, Tensor grad_v, int nope, str backend) -> (Tensor, Tensor)", _split_fake
)
def _split(grad_k, grad_v, nope, backend):
    if not _is_triton(backend, grad_k, grad_v):
        return reference.join_keys_backward(grad_k, grad_v, nope)
    from .triton.launch_heads import split_keys as launch

    return launch(_dense(grad_k), _dense(grad_v), nope)


class _RotateQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, cos, sin, interleave, backend):
        ctx.angles, ctx.interleave, ctx.backend = (cos, sin), interleave, backend
        return dispatch.ops.rotate_queries(q, cos, sin, interleave, False, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        back = dispatch.ops.rotate_queries(grad, *ctx.angles, ctx.interleave, True, ctx.backend)
        return back, None, None, None, None


class _JoinKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, rope, nope, backend):
        ctx.nope, ctx.backend = nope, backend
        return dispatch.ops.join_keys(kv, rope, nope, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k, grad_v):
        grads = dispatch.ops.join_keys_backward(grad_k, grad_v, ctx.nope, ctx.backend)
        return *grads, None, None


def rotate_queries(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleave: bool = True, backend: str = "auto"
) -> torch.Tensor:
    """Rotary embedding of the last R columns of every head, the others as they are. Differentiable in q.

    Args:
        q: [B, T, H, N + R], as the projection gives it.
        cos, sin: [B or 1, T, R]: the first half is read.
        interleave: pairs are (x0, x1), (x2, x3), ...; else (x_j, x_{j + R/2}).
        backend: "auto", "triton" or "torch".

    Returns:
        [B, T, H, N + R], contiguous, the rotated part laid out [first of each pair | second of each pair].

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    _check_queries(q, cos, sin)
    return _RotateQueries.apply(q, cos, sin, interleave, backend)


def _check_queries(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.dim() != 4 or cos.shape != sin.shape or cos.shape[1] != q.shape[1] or cos.shape[2] > q.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} must be [B, T, H, N + R] and cos, sin [B, T, R], got {tuple(cos.shape)}")


def rotate_queries_(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleave: bool = True, backend: str = "auto"
) -> torch.Tensor:
    """``rotate_queries`` in place, which moves a third of the bytes; returns q.

    Raises:
        ValueError: shapes that do not fit, rows that are not dense, a gradient is wanted.
        RuntimeError: a backend asked for that cannot run here.
    """
    _check_queries(q, cos, sin)
    if q.stride(-1) != 1 or (torch.is_grad_enabled() and q.requires_grad):
        raise ValueError("rotate_queries_ takes dense rows, and has no gradient; use rotate_queries")
    dispatch.ops.rotate_queries_(q, cos, sin, interleave, backend)
    return q


def join_keys(
    kv: torch.Tensor, rope: torch.Tensor, nope: int, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every head's key, its own part beside the rotated part that all share, and its value. Differentiable.

    Args:
        kv: [B, S, H, N + V], as ``kv_b_proj`` gives it.
        rope: [B, S, R], rotated; taken in kv's dtype.
        nope: N.
        backend: "auto", "triton" or "torch".

    Returns:
        Keys [B, S, H, N + R] and values [B, S, H, V], contiguous.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if kv.dim() != 4 or rope.shape[:2] != kv.shape[:2] or rope.dim() != 3 or not 0 <= nope <= kv.shape[3]:
        raise ValueError(f"kv {tuple(kv.shape)} must be [B, S, H, N + V] with N = {nope}, rope {tuple(rope.shape)} "
                         "[B, S, R]")  # fmt: skip
    return _JoinKeys.apply(kv, rope.to(kv.dtype), nope, backend)
