"""A decoder layer's step for a single token, a conversation at batch 1: two objects a layer that launch all of it.

D hidden, S cached slots, H heads, Q q_lora_rank, C kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim,
V v_head_dim, E experts, K experts a token, F expert width. Such a step is bound by reading the weights, and before
that by the host, which launches one kernel after another. So norms, routing, residuals and sums are done on the way
over the weights, and what stays from step to step is looked at when an object is made. None has a gradient, and none
goes through torch's dispatcher: ask `is_single` first. Source: DeepSeek-V3 report, section 2.1.
"""

import os
from typing import Any, NamedTuple

import torch

from . import dispatch, mla
from .norm import TRITON_DTYPES, check_write, coding_reason
from .reference import single as reference

OPERATION = "single_token"


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons

# What is joined here: who asks for a back end of one of these gets them one by one.
JOINED = (OPERATION, "mla_decode", "decode_step", "norm_rope", "experts_decode", "route")


def is_single(x: torch.Tensor) -> bool:
    """Whether the objects here are to be used: x [B, T, D] is a single token, nothing is cast on the way, nothing
    looks on (a compiler, a mode of torch's, a gradient), and nobody has asked for other back ends of what is joined
    here."""
    if x.numel() != x.shape[-1] or torch.is_autocast_enabled(x.device.type) or not dispatch.unwatched((x,)):
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


class _Single:
    """What the objects share: the check of the token, and the choice of a back end, made once."""

    def __init__(self, weights: tuple[torch.Tensor | None, ...], backend: str) -> None:
        self._held, self._backend = [weight for weight in weights if weight is not None], backend
        self.dtype = self._held[0].dtype
        self._chosen: dict[Any, bool] = {}
        self._launches: Any = None

    def _is_triton(
        self, x: torch.Tensor, latent: torch.Tensor | None = None, rope: torch.Tensor | None = None
    ) -> bool:
        if x.dim() != 3 or x.shape[0] != 1 or x.shape[1] != 1 or x.dtype != self.dtype:
            raise ValueError(
                f"{OPERATION} takes one token [1, 1, D] of {self.dtype}, got {tuple(x.shape)} of {x.dtype}"
            )
        key = (x.device, None if latent is None else latent.dtype)
        chosen = self._chosen.get(key)
        if chosen is None:
            reasons = _reasons(x.device)
            reasons["triton"] = reasons["triton"] or self._reason(x, latent, rope)
            chosen = dispatch.choose(OPERATION, reasons, self._backend, x.device) == "triton"
            self._chosen[key] = chosen
        return chosen

    def _reason(self, x: torch.Tensor, latent: torch.Tensor | None, rope: torch.Tensor | None) -> str | None:
        """Why the kernels do not serve these."""
        kinds = {weight.dtype for weight in self._held}
        if self.dtype not in TRITON_DTYPES or len(kinds) > 1:
            return f"weights of {', '.join(map(str, kinds))}"
        if any(weight.stride(-1) != 1 for weight in self._held):
            return "a last dimension that is not dense"
        if latent is None or rope is None:
            return None
        codes = latent.dtype == torch.float8_e4m3fn
        return (coding_reason(latent) if codes else None) or mla.shape_reason(x, rope, latent)


class SingleAttention(_Single):
    """``x + attention(norm(x))`` in latent space, the new token's latent and key written to the cache on the way.

    Args:
        weights: all of one dtype.
        heads: H.
        softmax_scale: on the logits.
        interleave: as for ``rotate``.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self,
        weights: AttentionWeights,
        heads: int,
        *,
        softmax_scale: float,
        interleave: bool = True,
        backend: str = "auto",
    ) -> None:
        norm, q_a, q_norm, kv_a, kv_norm, q_b, kv_b, o = weights
        low = None if q_norm is None else q_norm.weight
        super().__init__((q_b, norm.weight, q_a, low, kv_a, kv_norm.weight, kv_b, o), backend)
        width, first = norm.weight.numel(), q_b if q_a is None else q_a
        fits = first.shape[1] == kv_a.shape[1] == o.shape[0] == width and kv_b.shape[1] == kv_norm.weight.numel()
        if low is not None and q_a is not None:
            fits = fits and q_b.shape[1] == q_a.shape[0] == low.numel()
        if not fits or any(size % heads for size in (q_b.shape[0], kv_b.shape[0], o.shape[1])):
            shapes = {name: tuple(w.shape) for name, w in weights._asdict().items() if isinstance(w, torch.Tensor)}
            raise ValueError(f"weights that do not fit {heads} heads or each other: {shapes}")
        self._weights, self._options = weights, (heads, softmax_scale, interleave)

    def __call__(
        self,
        x: torch.Tensor,
        latent: torch.Tensor,
        rope: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        used: int | None = None,
        lengths: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """
        Args:
            x: [1, 1, D], of the weights' dtype.
            latent, rope, scale: the cache [1, S, C], [1, S, R] and, of codes, [1, S, ceil(C / 128)]: as for
                ``write_latents``.
            angles: cos and sin [1, 1, R].
            slots: integer [1, 1], where the token goes.
            used: how many of the S slots hold something, the new token's among them; None for all.
            lengths, starts, sliding_window: as for ``mla_decode``.

        Returns:
            [1, 1, D].

        Raises:
            ValueError: another token or cache than the weights are for. RuntimeError: a backend that cannot run here.
        """
        kv_a = self._weights.kv_a
        if latent.shape[0] != 1 or latent.shape[2] + rope.shape[2] != kv_a.shape[0] or slots.numel() != 1:
            check_write(latent, rope, kv_a[:, :1].view(1, 1, -1), slots, scale)
        used = latent.shape[1] if used is None else used
        more = (*angles, slots, lengths, starts, sliding_window)
        if not self._is_triton(x, latent, rope):
            coded = None if scale is None else scale[:, :used]
            cache = (latent[:, :used], rope[:, :used], coded)
            return reference.attention(x, self._weights, *self._options, *cache, *more)
        if self._launches is None:
            from .triton.launch_single import Attention

            self._launches = dispatch.guarded(Attention(self._weights, *self._options))
        return self._launches(x.contiguous(), latent, rope, scale, used, *more)


class SingleMLP(_Single):
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``.

    Args:
        norm: before. gate, up: [F, D]. down: [D, F]. All of one dtype.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self, norm: Norm, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, backend: str = "auto"
    ) -> None:
        super().__init__((gate, norm.weight, up, down), backend)
        if gate.shape != up.shape or down.shape != gate.shape[::-1] or gate.shape[1] != norm.weight.numel():
            raise ValueError(f"gate {tuple(gate.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit")
        self._weights = (norm, gate, up, down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, 1, D], of the weights' dtype, to [1, 1, D].

        Raises:
            ValueError: another x. RuntimeError: a backend that cannot run here.
        """
        if not self._is_triton(x):
            return reference.mlp(x, *self._weights)
        if self._launches is None:
            from .triton.launch_single import MLP

            self._launches = dispatch.guarded(MLP(*self._weights))
        return self._launches(x.contiguous())


class SingleExperts(_Single):
    """``x`` plus the routed and the shared experts of ``norm(x)``.

    Args:
        norm: before.
        router: how to choose K of the E experts.
        gate_up, down: [E, 2F, D] with the gate rows first, and [E, D, F].
        shared: gate and up [S, D] and down [D, S] of the shared experts.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self,
        norm: Norm,
        router: Router,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        backend: str = "auto",
    ) -> None:
        gate, up, own_down = shared
        super().__init__((gate_up, norm.weight, router.weight, down, *shared), backend)
        experts, width, inner = down.shape
        fits = gate.shape == up.shape == own_down.shape[::-1] and gate.shape[1] == width == norm.weight.numel()
        if not fits or gate_up.shape != (experts, 2 * inner, width) or router.weight.shape != (experts, width):
            raise ValueError(
                f"gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}, the router {tuple(router.weight.shape)} "
                f"or the shared experts' {tuple(gate.shape)}, {tuple(up.shape)}, {tuple(own_down.shape)} do not fit"
            )
        self._weights = (norm, router, gate_up, down, shared)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, 1, D], of the weights' dtype, to [1, 1, D].

        Raises:
            ValueError: another x. RuntimeError: a backend that cannot run here.
        """
        if not self._is_triton(x):
            return reference.moe(x, *self._weights)
        if self._launches is None:
            from .triton.launch_single import Experts

            self._launches = dispatch.guarded(Experts(*self._weights))
        return self._launches(x.contiguous())
