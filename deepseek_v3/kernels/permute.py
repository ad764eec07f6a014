"""Which expert a token goes to, and the order of the (token, expert) pairs that the experts work in.

T tokens, E experts, K experts a token, G groups, P = T * K pairs. Pair p belongs to token ``p // K``. A pair whose
index is E or more belongs to an expert that lives elsewhere: it is sorted behind ``offsets[E]`` and adds nothing.
"""

import torch

from . import dispatch
from .reference import experts as reference


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS["route"] = _reasons
dispatch.OPERATIONS["permute"] = _reasons


def _sort_fake(index, experts, backend):
    pairs = index.new_empty(index.numel(), dtype=torch.int32)
    return pairs, torch.empty_like(pairs), index.new_empty(experts + 1, dtype=torch.int32)


@dispatch.define("sort_pairs(Tensor index, int experts, str backend) -> (Tensor, Tensor, Tensor)", _sort_fake)
def _sort(index, experts, backend):
    if dispatch.choose("permute", _reasons(index.device), backend, index.device) == "torch":
        return reference.sort_pairs(index, experts)
    from .triton.launch_permute import sort_pairs as launch

    return launch(index, experts)


def _combine_fake(y, inverse, offsets, weights, tokens, backend):
    return y.new_empty(tokens, y.shape[1])


@dispatch.define(
    "combine(Tensor y, Tensor inverse, Tensor offsets, Tensor? weights, SymInt tokens, str backend) -> Tensor",
    _combine_fake,
)
def _combine(y, inverse, offsets, weights, tokens, backend):
    reasons = _reasons(y.device)
    if y.dtype == torch.float64:
        reasons["triton"] = reasons["triton"] or "float64"
    if dispatch.choose("permute", reasons, backend, y.device) == "torch":
        return reference.combine(y, inverse, offsets, weights, tokens)
    from .triton.launch_permute import combine as launch

    return launch(y.contiguous(), inverse, offsets, None if weights is None else weights.contiguous(), tokens)


def _route_fake(logits, bias, groups, kept_groups, top_k, normalise, scaling, backend):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


@dispatch.define(
    "route(Tensor logits, Tensor? bias, int groups, int kept_groups, int top_k, bool normalise, float scaling,"
    " str backend) -> (Tensor, Tensor)",
    _route_fake,
)
def _route(logits, bias, groups, kept_groups, top_k, normalise, scaling, backend):
    if dispatch.choose("route", _reasons(logits.device), backend, logits.device) == "torch":
        index, weights = reference.route(logits, bias, groups, kept_groups, top_k, normalise, scaling)
        return index.contiguous(), weights.float()
    from .triton.launch_permute import route as launch

    dense = logits if logits.stride(-1) == 1 else logits.contiguous()
    return launch(dense, bias, groups, kept_groups, top_k, normalise, scaling)


def sort_pairs(
    index: torch.Tensor, experts: int, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stable order of the pairs by expert, without a host read-back on the GPU.

    Args:
        index: integer [T, K], expert of each pair; from 0 up, E and more for an expert that lives elsewhere.
        experts: E, the experts here.
        backend: "auto", "triton" or "torch".

    Returns:
        order: int32 [P], the pair at each sorted place.
        inverse: int32 [P], the sorted place of each pair.
        offsets: int32 [E + 1]; the pairs of expert e are at places ``offsets[e]`` to ``offsets[e + 1]``.

    Raises:
        ValueError: index is no integer matrix, experts below 1, an unknown backend.
        RuntimeError: a backend asked for that cannot run here.
    """
    if index.dim() != 2 or index.is_floating_point() or experts < 1:
        raise ValueError(f"index must be integers [T, K], got {index.dtype} {tuple(index.shape)}; experts {experts}")
    return dispatch.ops.sort_pairs(index, experts, backend)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, inverse, offsets, weights, tokens, backend):
        ctx.save_for_backward(y if weights is not None else None, inverse, offsets, weights)
        return dispatch.ops.combine(y, inverse, offsets, weights, tokens, backend)

    @staticmethod
    def backward(ctx, grad):
        y, inverse, offsets, weights = ctx.saved_tensors
        tokens = grad.shape[0]
        place = inverse.long().view(tokens, -1)
        alive = place < offsets[-1]
        rows = grad[:, None].expand(*place.shape, grad.shape[1])
        grad_weights = None
        if weights is not None:
            # Rows of no expert were never written: they are masked, not multiplied by zero.
            products = (rows.float() if grad.dtype != torch.float64 else rows) * y[place]
            grad_weights = products.sum(-1).masked_fill(~alive, 0).to(weights.dtype)
            rows = rows * weights[..., None].to(grad.dtype)
        grad_y = grad.new_empty(inverse.numel(), grad.shape[1])
        grad_y[inverse.long()] = rows.reshape(grad_y.shape).masked_fill(~alive.reshape(-1, 1), 0)
        return grad_y, None, None, grad_weights, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, inverse, offsets, backend):
        ctx.save_for_backward(inverse, offsets)
        ctx.tokens, ctx.backend = x.shape[0], backend
        return reference.gather_rows(x, order, order.numel() // x.shape[0])

    @staticmethod
    def backward(ctx, grad):
        inverse, offsets = ctx.saved_tensors
        grad_x = dispatch.ops.combine(grad.contiguous(), inverse, offsets, None, ctx.tokens, ctx.backend)
        return grad_x, None, None, None, None


def gather_pairs(
    x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Each sorted pair's token: [T, D] -> [P, D]. Differentiable; the gradient is summed in a fixed order.

    Args:
        x: [T, D]. order, inverse, offsets: from ``sort_pairs``. backend: of the backward's sum.
    """
    return _Gather.apply(x, order, inverse, offsets, backend)


def combine_pairs(
    y: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Weighted sum of each token's pairs, accumulated in float32: [P, D] -> [T, D]. Differentiable.

    Args:
        y: [P, D] in sorted order; rows from ``offsets[E]`` on are not read.
        inverse, offsets: from ``sort_pairs``.
        weights: floating [T, K].
        backend: "auto", "triton" or "torch".
    """
    return _Combine.apply(y, inverse, offsets, weights, weights.shape[0], backend)


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    groups: int = 1,
    kept_groups: int = 1,
    top_k: int,
    normalise: bool = True,
    scaling: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's choice of experts from router logits (report, equations 12 to 16, section 2.1.2).

    Scores are sigmoids. ``bias`` is added for the choice alone: of G groups the ``kept_groups`` with the largest
    sum of their two best biased scores stay, of their experts the ``top_k`` best; equals go to the lower index. The
    weights are the unbiased scores of the chosen, normalised by their sum plus 1e-20 and times ``scaling``.

    Args:
        logits: [T, E], any floating dtype; arithmetic in float32.
        bias: float32 [E] or None.
        groups, kept_groups, top_k, normalise, scaling: as above.
        backend: "auto", "triton" or "torch". Where a gradient is wanted the torch path runs.

    Returns:
        index: int64 [T, K], best first. weights: float32 [T, K].

    Raises:
        ValueError: shapes or counts that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if logits.dim() != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(f"logits must be [T, E] and bias [E], got {tuple(logits.shape)}")
    experts = logits.shape[1]
    if groups < 1 or experts % groups or not 1 <= kept_groups <= groups:
        raise ValueError(f"{experts} experts do not make {groups} groups of which {kept_groups} are kept")
    if not 1 <= top_k <= kept_groups * (experts // groups):
        raise ValueError(f"top_k {top_k} is more than {kept_groups} groups of {experts // groups} experts hold")
    if torch.is_grad_enabled() and logits.requires_grad:
        if dispatch.requested("route", backend)[0] not in ("auto", "torch"):
            raise RuntimeError(f"route on {backend!r} has no gradient; use backend='torch' or torch.no_grad()")
        return reference.route(logits, bias, groups, kept_groups, top_k, normalise, scaling)
    return dispatch.ops.route(logits, bias, groups, kept_groups, top_k, normalise, scaling, backend)
