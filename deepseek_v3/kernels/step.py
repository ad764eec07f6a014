"""Steps of a decode layer that are joined into one launch each: with few tokens, a step is bound by its launches.

B batch, T query tokens, S slots of the cache, H heads, Q q_lora_rank, C kv_lora_rank, R qk_rope_head_dim,
N qk_nope_head_dim, V v_head_dim. Source: DeepSeek-V2 report (arXiv 2405.04434), section 2.1. None has a gradient.
"""

import torch

from . import dispatch
from .norm import TRITON_DTYPES, check_write, coding_reason
from .reference import step as reference

OPERATION = "decode_step"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _is_triton(x: torch.Tensor, backend: str, *others: torch.Tensor, reason: str | None = None) -> bool:
    reasons = _reasons(x.device)
    reasons["triton"] = reasons["triton"] or reason
    if x.dtype not in TRITON_DTYPES or any(other.dtype != x.dtype for other in others):
        reasons["triton"] = reasons["triton"] or f"{x.dtype} with {', '.join(str(other.dtype) for other in others)}"
    return dispatch.choose(OPERATION, reasons, backend, x.device) == "triton"


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos: torch.Tensor, sin: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return (cos, sin) if cos.shape[0] == batch else (cos.expand(batch, -1, -1), sin.expand(batch, -1, -1))


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(f"{OPERATION} has no gradient; call it under torch.no_grad()")


def _angles_fake(positions, frequencies, factor, dtype, backend):
    shape = (*positions.shape, 2 * frequencies.shape[0])
    return frequencies.new_empty(shape, dtype=dtype), frequencies.new_empty(shape, dtype=dtype)


@dispatch.define(
    "rope_angles(Tensor positions, Tensor frequencies, float factor, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    _angles_fake,
)
def _rope_angles(positions, frequencies, factor, dtype, backend):
    if not _is_triton(frequencies, backend) or dtype not in TRITON_DTYPES:
        return reference.rope_angles(positions, frequencies, factor, dtype)
    from .triton.launch_step import rope_angles as launch

    return launch(positions, _dense(frequencies), factor, dtype)


def rope_angles(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position times frequency, computed in float32, times ``factor``.

    Args:
        positions: integer [B or 1, T].
        frequencies: float32 [R / 2].
        factor: YaRN's attention factor, 1 without.
        dtype: of the results.
        backend: "auto", "triton" or "torch".

    Returns:
        cos and sin, [B or 1, T, R], each half holding the same R / 2 angles.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if positions.dim() != 2 or frequencies.dim() != 1:
        raise ValueError(f"positions {tuple(positions.shape)} must be [B, T], frequencies {tuple(frequencies.shape)} "
                         "[R / 2]")  # fmt: skip
    return dispatch.ops.rope_angles(positions, frequencies, factor, dtype, backend)


@dispatch.define(
    "norm_and_write_(Tensor low, Tensor low_weight, float low_eps, Tensor(a!) latent, Tensor(b!) rope,"
    " Tensor compressed, Tensor weight, float eps, Tensor cos, Tensor sin, Tensor slots, bool interleave,"
    " Tensor(c!)? scale, str backend) -> Tensor",
    lambda low, *others: low.new_empty(low.shape),
)
def _norm_and_write(
    low, low_weight, low_eps, latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale, backend
):
    if not _is_triton(low, backend, low_weight, compressed, weight, reason=coding_reason(scale)):
        return reference.norm_and_write(
            low, low_weight, low_eps, latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale
        )
    from .triton.launch_step import norm_and_write as launch

    cos, sin = _angles(cos, sin, low.shape[0])
    low, compressed = _dense(low), _dense(compressed)
    return launch(low, low_weight, low_eps, latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale)


def norm_and_write(
    low: torch.Tensor,
    low_weight: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    compressed: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    low_eps: float = 1e-6,
    eps: float = 1e-6,
    interleave: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """``rms_norm`` of the queries' low rank, and ``write_latents``, in one launch.

    Args:
        low: [B, T, Q], what ``q_a_proj`` gave. low_weight: [Q]. low_eps: of its norm.
        latent, rope, compressed, weight, cos, sin, slots, scale, eps, interleave: as for ``write_latents``.
        backend: "auto", "triton" or "torch".

    Returns:
        [B, T, Q], contiguous.

    Raises:
        ValueError: shapes that do not fit, or a gradient is wanted. RuntimeError: a backend that cannot run here.
    """
    if low.shape[:2] != compressed.shape[:2] or low_weight.shape != low.shape[2:]:
        raise ValueError(f"low {tuple(low.shape)} and its weight {tuple(low_weight.shape)} do not fit compressed "
                         f"{tuple(compressed.shape)}")  # fmt: skip
    check_write(latent, rope, compressed, slots, scale)
    _refuse_gradients(low, low_weight, compressed, weight)
    return dispatch.ops.norm_and_write_(
        low, low_weight, low_eps, latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale, backend
    )


def _queries_fake(q, weight, cos, sin, interleave, backend):
    return q.new_empty(*q.shape[:3], weight.shape[1]), q.new_empty(*q.shape[:3], cos.shape[2])


@dispatch.define(
    "absorb_queries(Tensor q, Tensor weight, Tensor cos, Tensor sin, bool interleave, str backend)"
    " -> (Tensor, Tensor)",
    _queries_fake,
)
def _absorb_queries(q, weight, cos, sin, interleave, backend):
    if not _is_triton(q, backend, weight):
        latent, turned = reference.absorb_queries(q, weight, cos, sin, interleave)
        return latent.contiguous(), turned.contiguous()
    from .triton.launch_step import absorb_queries as launch

    return launch(_dense(q), weight, *_angles(cos, sin, q.shape[0]), interleave)


def absorb_queries(
    q: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleave: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries in latent space: ``kv_b_proj``'s key half applied to them, and their last R columns rotated.

    Args:
        q: [B, T, H, N + R], as the projection gives it.
        weight: [H * (N + V), C], of ``kv_b_proj``, in q's dtype.
        cos, sin: [B or 1, T, R]: the first half is read.
        interleave: pairs are (x0, x1), (x2, x3), ...; else (x_j, x_{j + R/2}).
        backend: "auto", "triton" or "torch".

    Returns:
        [B, T, H, C] and the rotated [B, T, H, R], contiguous.

    Raises:
        ValueError: shapes that do not fit, or a gradient is wanted. RuntimeError: a backend that cannot run here.
    """
    if q.dim() != 4 or cos.shape != sin.shape or cos.shape[1] != q.shape[1] or weight.shape[0] % q.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} must be [B, T, H, N + R], cos and sin [B, T, R] and weight [H (N + V), "
                         f"C], got {tuple(cos.shape)} and {tuple(weight.shape)}")  # fmt: skip
    _refuse_gradients(q, weight)
    return dispatch.ops.absorb_queries(q, weight, cos, sin, interleave, backend)


@dispatch.define(
    "absorb_outputs(Tensor mixed, Tensor weight, int value, str backend) -> Tensor",
    lambda mixed, weight, value, backend: mixed.new_empty(*mixed.shape[:3], value),
)
def _absorb_outputs(mixed, weight, value, backend):
    if not _is_triton(mixed, backend, weight):
        return reference.absorb_outputs(mixed, weight, value).contiguous()
    from .triton.launch_step import absorb_outputs as launch

    return launch(_dense(mixed), weight, value)


def absorb_outputs(mixed: torch.Tensor, weight: torch.Tensor, value: int, *, backend: str = "auto") -> torch.Tensor:
    """Attention's result in latent space to every head's values: ``kv_b_proj``'s value half applied to it.

    Args:
        mixed: [B, T, H, C].
        weight: [H * (N + V), C], of ``kv_b_proj``, in mixed's dtype.
        value: V.
        backend: "auto", "triton" or "torch".

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        ValueError: shapes that do not fit, or a gradient is wanted. RuntimeError: a backend that cannot run here.
    """
    if mixed.dim() != 4 or weight.shape[1] != mixed.shape[3] or weight.shape[0] % mixed.shape[2]:
        raise ValueError(f"mixed {tuple(mixed.shape)} must be [B, T, H, C] and weight {tuple(weight.shape)} "
                         "[H (N + V), C]")  # fmt: skip
    _refuse_gradients(mixed, weight)
    return dispatch.ops.absorb_outputs(mixed, weight, value, backend)
