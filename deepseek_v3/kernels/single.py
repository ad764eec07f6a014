"""A decoder layer's step for a single token in two operations: what a conversation at batch 1 does all the time.

D hidden, S cached slots, H heads, Q q_lora_rank, C kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim,
V v_head_dim, E experts, K experts a token, F expert width. Such a step is bound by reading the weights, and before
that by the host, which launches one kernel after another: here an operation launches all of its kernels, which norm,
route and add on their way over the weights. None has a gradient. Source: DeepSeek-V3 report, section 2.1.
"""

import os
from typing import NamedTuple

import torch

from . import dispatch, mla
from .norm import TRITON_DTYPES, check_write, coding_reason
from .reference import single as reference

OPERATION = "single_token"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


# What is joined here: who asks for a back end of one of these gets them one by one.
JOINED = ("mla_decode", "decode_step", "norm_rope", "experts_decode", "route")


def is_single(x: torch.Tensor) -> bool:
    """Whether the operations here are the ones to take: x [B, T, D] is a single token, nothing is cast on the way, and
    nobody has asked for other back ends of what they join."""
    if x.numel() != x.shape[-1] or torch.is_autocast_enabled(x.device.type):
        return False
    narrowed = os.environ.get(dispatch.ENVIRONMENT)
    return not narrowed or all(dispatch.requested(name, "auto")[0] in ("auto", "triton") for name in JOINED)


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and what is added to the mean square."""

    weight: torch.Tensor
    eps: float


class AttentionWeights(NamedTuple):
    """Latent attention's matrices as [out, in], and its norms.

    q_a [Q, D] and q_norm: None without a low rank. kv_a [C + R, D]. q_b [H * (N + R), Q or D].
    kv_b [H * (N + V), C]. o [D, H * V].
    """

    norm: Norm
    q_a: torch.Tensor | None
    q_norm: Norm | None
    kv_a: torch.Tensor
    kv_norm: Norm
    q_b: torch.Tensor
    kv_b: torch.Tensor
    o: torch.Tensor


class Router(NamedTuple):
    """weight [E, D]; bias float32 [E]; the others as of ``route``."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    kept_groups: int
    top_k: int
    normalise: bool
    scaling: float


def _is_triton(backend: str, x: torch.Tensor, *others: torch.Tensor | None, reason: str | None = None) -> bool:
    reasons = _reasons(x.device)
    if reasons["triton"] is None:
        held = [other for other in others if other is not None]
        if x.dtype not in TRITON_DTYPES or any(other.dtype != x.dtype for other in held):
            reason = reason or f"weights of {', '.join({str(other.dtype) for other in held})} and {x.dtype}"
        if any(other.stride(-1) != 1 for other in held):
            reason = reason or "a last dimension that is not dense"
        reasons["triton"] = reason
    return dispatch.choose(OPERATION, reasons, backend, x.device) == "triton"


def _check(x: torch.Tensor, *weights: torch.Tensor | None) -> None:
    """Refuse what is no single token, weights [out, D or so] for another width, and gradients."""
    if x.dim() != 3 or x.shape[:2] != (1, 1):
        raise ValueError(f"{OPERATION} takes one token [1, 1, D], got {tuple(x.shape)}")
    for weight in weights:
        if weight is not None and weight.shape[-1] != x.shape[-1]:
            raise ValueError(f"a weight {tuple(weight.shape)} does not fit a token of {x.shape[-1]} numbers")
    if torch.is_grad_enabled():
        raise ValueError(f"{OPERATION} has no gradient; call it under torch.no_grad()")


@dispatch.define(
    "single_attention(Tensor x, Tensor gain, float eps, Tensor? q_a, Tensor? q_gain, float q_eps, Tensor kv_a,"
    " Tensor kv_gain, float kv_eps, Tensor q_b, Tensor kv_b, Tensor o, int heads, Tensor(a!) latent,"
    " Tensor(b!) rope, Tensor(c!)? scale, Tensor cos, Tensor sin, Tensor slots, float softmax_scale,"
    " Tensor? lengths, Tensor? starts, int? window, bool interleave, str backend) -> Tensor",
    lambda x, *others: x.new_empty(x.shape),
)
def _attention(x, *arguments):
    *arguments, backend = arguments
    gain, _, q_a, q_gain, _, kv_a, kv_gain, _, q_b, kv_b, o, _, latent, rope, scale = arguments[:15]
    reason = coding_reason(scale) or mla.shape_reason(x, rope, latent)
    if not _is_triton(backend, x, gain, q_a, q_gain, kv_a, kv_gain, q_b, kv_b, o, reason=reason):
        return reference.attention(x, *arguments)
    from .triton.launch_single import attention as launch

    return launch(x.contiguous(), *arguments)


def single_attention(
    x: torch.Tensor,
    weights: AttentionWeights,
    heads: int,
    latent: torch.Tensor,
    rope: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    *,
    softmax_scale: float,
    scale: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    sliding_window: int | None = None,
    interleave: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """``x + attention(norm(x))`` in latent space, the new token's latent and key written to the cache on the way.

    Args:
        x: [1, 1, D].
        weights: of x's dtype.
        heads: H.
        latent, rope, scale: the cache [1, S, C], [1, S, R] and, of codes, [1, S, ceil(C / 128)]: as for
            ``write_latents``.
        angles: cos and sin [1, 1, R].
        slots: integer [1, 1], where the token goes.
        softmax_scale: on the logits.
        lengths, starts, sliding_window: as for ``mla_decode``.
        interleave: as for ``rotate``.
        backend: "auto", "triton" or "torch".

    Returns:
        [1, 1, D].

    Raises:
        ValueError: shapes that do not fit, a gradient may be wanted. RuntimeError: a backend that cannot run here.
    """
    norm, q_a, q_norm, kv_a, kv_norm, q_b, kv_b, o = weights
    _check(x, q_b if q_a is None else q_a, kv_a)
    check_write(latent, rope, kv_a[:, :1].view(1, 1, -1), slots, scale)
    q_gain, q_eps = (None, 0.0) if q_norm is None else q_norm
    return dispatch.ops.single_attention(
        x, *norm, q_a, q_gain, q_eps, kv_a, *kv_norm, q_b, kv_b, o, heads, latent, rope, scale, *angles, slots,
        softmax_scale, lengths, starts, sliding_window, interleave, backend,
    )  # fmt: skip


@dispatch.define(
    "single_mlp(Tensor x, Tensor gain, float eps, Tensor gate, Tensor up, Tensor down, str backend) -> Tensor",
    lambda x, *others: x.new_empty(x.shape),
)
def _mlp(x, gain, eps, gate, up, down, backend):
    if not _is_triton(backend, x, gain, gate, up, down):
        return reference.mlp(x, gain, eps, gate, up, down)
    from .triton.launch_single import mlp as launch

    return launch(x.contiguous(), gain, eps, gate, up, down)


def single_mlp(
    x: torch.Tensor, norm: Norm, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``.

    Args:
        x: [1, 1, D]. gate, up: [F, D]. down: [D, F]. All of one dtype.
        backend: "auto", "triton" or "torch".

    Returns:
        [1, 1, D].

    Raises:
        ValueError: shapes that do not fit, a gradient may be wanted. RuntimeError: a backend that cannot run here.
    """
    _check(x, gate, up)
    if gate.shape != up.shape or down.shape != gate.shape[::-1]:
        raise ValueError(f"gate {tuple(gate.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit")
    return dispatch.ops.single_mlp(x, *norm, gate, up, down, backend)


@dispatch.define(
    "single_experts(Tensor x, Tensor gain, float eps, Tensor router, Tensor bias, int groups, int kept_groups,"
    " int top_k, bool normalise, float scaling, Tensor gate_up, Tensor down, Tensor shared_gate, Tensor shared_up,"
    " Tensor shared_down, str backend) -> Tensor",
    lambda x, *others: x.new_empty(x.shape),
)
def _experts(x, *arguments):
    *arguments, backend = arguments
    if not _is_triton(backend, x, arguments[0], arguments[2], *arguments[-5:]):
        return reference.moe(x, *arguments)
    from .triton.launch_single import experts as launch

    return launch(x.contiguous(), *arguments)


def single_experts(
    x: torch.Tensor,
    norm: Norm,
    router: Router,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """``x`` plus the routed and the shared experts of ``norm(x)``.

    Args:
        x: [1, 1, D].
        router: how to choose K of the E experts.
        gate_up, down: [E, 2F, D] with the gate rows first, and [E, D, F].
        shared: gate and up [S, D] and down [D, S] of the shared experts.
        backend: "auto", "triton" or "torch".

    Returns:
        [1, 1, D].

    Raises:
        ValueError: shapes that do not fit, a gradient may be wanted. RuntimeError: a backend that cannot run here.
    """
    gate, up, own_down = shared
    _check(x, router.weight, gate_up, gate, up)
    if gate.shape != up.shape or own_down.shape != gate.shape[::-1] or 2 * down.shape[2] != gate_up.shape[1]:
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)}, or the shared experts' {tuple(gate.shape)}, "
            f"{tuple(up.shape)} and {tuple(own_down.shape)} do not fit"
        )
    return dispatch.ops.single_experts(x, *norm, *router, gate_up, down, gate, up, own_down, backend)
