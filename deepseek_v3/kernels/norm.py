"""The small steps of a decode layer, one launch each: RMSNorm, rotary embedding, write of the new latents.

B batch, T query tokens, S slots of the cache, H heads, C kv_lora_rank, R qk_rope_head_dim. Source: DeepSeek-V2 report
(arXiv 2405.04434), section 2.1. Where a gradient is wanted the torch path runs: the kernels have none.
"""

import torch

from . import dispatch
from .fp8 import FP8_CARD
from .reference import norm as reference

OPERATION = "norm_rope"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _is_triton(x: torch.Tensor, backend: str, reason: str | None = None) -> bool:
    reasons = _reasons(x.device)
    reasons["triton"] = reasons["triton"] or reason
    if x.dtype not in TRITON_DTYPES:
        reasons["triton"] = reasons["triton"] or f"{x.dtype}"
    return dispatch.choose(OPERATION, reasons, backend, x.device) == "triton"


def _wants_gradient(backend: str, *tensors: torch.Tensor | None) -> bool:
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors):
        return False
    if dispatch.requested(OPERATION, backend)[0] not in ("auto", "torch"):
        raise RuntimeError(f"{OPERATION} on {backend!r} has no gradient; use backend='torch' or torch.no_grad()")
    return True


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _norm_fake(x, weight, eps, residual, backend):
    total = x.new_empty(x.shape if residual is not None else (0,))
    return x.new_empty(x.shape), total


@dispatch.define(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual, str backend) -> (Tensor, Tensor)", _norm_fake
)
def _norm(x, weight, eps, residual, backend):
    if _is_triton(x, backend) and x.dtype == weight.dtype:
        from .triton.launch_norm import rms_norm as launch

        rows = _dense(x.reshape(-1, x.shape[-1]))
        out, total = launch(rows, weight, eps, None if residual is None else residual.contiguous())
    else:
        out, total = reference.rms_norm(x, weight, eps, residual)
    # An operation's results must not alias: without a residual there is no sum.
    return out.reshape(x.shape).contiguous(), x.new_empty(0) if residual is None else total.reshape(x.shape)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``weight * x / sqrt(mean(x^2) + eps)``, in float32 up to the quotient, which is rounded to x's dtype.

    Args:
        x: [..., D], bfloat16, float16, float32 (float64 on the torch path).
        weight: [D].
        eps: added to the mean square.
        residual: of x's shape and dtype, added first.
        backend: "auto", "triton" or "torch".

    Returns:
        [..., D]; with a residual, that and the sum ``x + residual``.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"x {tuple(x.shape)} needs a weight [{x.shape[-1]}] and a residual of its shape")
    if _wants_gradient(backend, x, weight, residual):
        out, total = reference.rms_norm(x, weight, eps, residual)
    else:
        out, total = dispatch.ops.rms_norm(x, weight, eps, residual, backend)
    return out if residual is None else (out, total)


def _rotate_fake(x, cos, sin, interleave, backend):
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width)


@dispatch.define("rotate(Tensor x, Tensor cos, Tensor sin, bool interleave, str backend) -> Tensor", _rotate_fake)
def _rotate(x, cos, sin, interleave, backend):
    """[B, T, H, R], as the decode kernel reads the queries."""
    if not _is_triton(x, backend):
        return reference.rotate(x, cos, sin, interleave).transpose(1, 2).contiguous()
    from .triton.launch_norm import rotate as launch

    cos, sin = _matching(cos, sin, x.shape[0])
    return launch(_dense(x), cos, sin, interleave)


def _matching(cos: torch.Tensor, sin: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin with one set of strides, expanded over the batch without a copy."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleave: bool = True, backend: str = "auto"
) -> torch.Tensor:
    """Rotary embedding of the last dimension.

    Args:
        x: [B, H, T, R], any strides.
        cos, sin: [B or 1, T, R] (or R / 2): the first half is read.
        interleave: pairs are (x0, x1), (x2, x3), ...; else (x_j, x_{j + R/2}).
        backend: "auto", "triton" or "torch".

    Returns:
        [B, H, T, R], laid out [first of each pair | second of each pair]; in memory [B, T, H, R].

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if x.dim() != 4 or x.shape[-1] % 2 or cos.shape != sin.shape or cos.shape[1] != x.shape[2]:
        raise ValueError(f"x {tuple(x.shape)} must be [B, H, T, R] and cos, sin [B, T, R], got {tuple(cos.shape)}")
    if _wants_gradient(backend, x, cos, sin):
        return reference.rotate(x, cos, sin, interleave)
    return dispatch.ops.rotate(x, cos, sin, interleave, backend).transpose(1, 2)


@dispatch.define(
    "write_latents_(Tensor(a!) latent, Tensor(b!) rope, Tensor compressed, Tensor weight, float eps, Tensor cos,"
    " Tensor sin, Tensor slots, bool interleave, Tensor(c!)? scale, str backend) -> ()",
    lambda *arguments: None,
)
def _write(latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale, backend):
    if not _is_triton(compressed, backend, coding_reason(scale)) or weight.dtype != compressed.dtype:
        reference.write_latents(latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale)
        return
    from .triton.launch_norm import write_latents as launch

    cos, sin = _matching(cos, sin, compressed.shape[0])
    launch(latent, rope, _dense(compressed), weight, eps, cos, sin, slots, interleave, scale)


def coding_reason(scale: torch.Tensor | None) -> str | None:
    """Why no kernel writes codes where their scales are to go: a card may have no casts to E4M3."""
    return None if scale is None else dispatch.triton_reason(scale.device, FP8_CARD)


def check_write(
    latent: torch.Tensor,
    rope: torch.Tensor,
    compressed: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    """Refuse new tokens that do not fit the cache they are to be written to."""
    batch, tokens = compressed.shape[:2]
    if compressed.shape[2] != latent.shape[2] + rope.shape[2] or latent.shape[:2] != rope.shape[:2]:
        raise ValueError(f"compressed {tuple(compressed.shape)} does not fit latent {tuple(latent.shape)} and rope "
                         f"{tuple(rope.shape)}")  # fmt: skip
    if slots.shape != (batch, tokens) or slots.is_floating_point():
        raise ValueError(f"slots must be integers [{batch}, {tokens}], got {slots.dtype} {tuple(slots.shape)}")
    groups = (*latent.shape[:2], -(-latent.shape[2] // reference.SCALE_GROUP))
    fits = scale is None or (scale.shape == groups and scale.dtype == torch.float32)
    if not fits or (latent.dtype == torch.float8_e4m3fn) != (scale is not None):
        given = None if scale is None else (tuple(scale.shape), scale.dtype)
        raise ValueError(f"scale must be float32 {groups} for a float8_e4m3fn latent, None for others; got {given}")
    if latent.stride(-1) != 1 or rope.stride(-1) != 1:
        raise ValueError("the cache's last dimensions must be dense")


def write_latents(
    latent: torch.Tensor,
    rope: torch.Tensor,
    compressed: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleave: bool = True,
    backend: str = "auto",
) -> None:
    """Normalise and rotate what ``kv_a_proj_with_mqa`` gave for T new tokens, and write it into the cache in place.

    Args:
        latent: [B, S, C] and rope: [B, S, R], the cache; views with dense last dimensions. The latent may be
            float8_e4m3fn: then codes are written, as ``quantize_activation`` gives them for the normalised latent.
        compressed: [B, T, C + R], latent first. Its rows take no part in gradients.
        weight: [C], of the norm. eps: of the norm.
        cos, sin: [B or 1, T, R], as for ``rotate``.
        slots: integer [B, T], where each token goes; distinct within a row and below S.
        scale: float32 [B, S, ceil(C / 128)], where the codes' scales go, with an FP8 latent alone.
        interleave, backend: as for ``rotate``.

    Raises:
        ValueError: shapes that do not fit, or a gradient is wanted. RuntimeError: a backend that cannot run here.
    """
    check_write(latent, rope, compressed, slots, scale)
    if torch.is_grad_enabled() and (compressed.requires_grad or weight.requires_grad):
        raise ValueError("write_latents has no gradient; call it under torch.no_grad()")
    dispatch.ops.write_latents_(latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale, backend)
