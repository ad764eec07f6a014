"""Routing, permutation and the matrix products of a mixture of experts, in plain torch.

T tokens, D hidden, E experts, K experts a token, F expert width, P = T * K pairs of a token and an expert. Pairs are
sorted by expert and, within an expert, by token; ``offsets[e]`` is where expert e begins, ``offsets[E]`` where the
last one ends. A pair whose expert is E or more belongs to nobody here and is sorted behind that end.
"""

import torch


def route(logits, bias, groups, kept_groups, top_k, normalise, scaling):
    """See ``deepseek_v3.kernels.route``."""
    scores = logits.float().sigmoid() if logits.dtype != torch.float64 else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    tokens, experts = choice.shape
    if groups > 1:
        grouped = choice.view(tokens, groups, experts // groups)
        group_score = grouped.topk(min(2, experts // groups), dim=-1).values.sum(-1)  # [T, G]
        kept = _first_largest(group_score, kept_groups)
        # Minus infinity, not zero: with strongly negative biases a zero would win.
        masked = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, kept, True)
        choice = grouped.masked_fill(~masked[..., None], float("-inf")).view(tokens, experts)
    index = _first_largest(choice, top_k)
    weights = scores.gather(1, index)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return index, weights * scaling


def _first_largest(values, count):
    """Indices of the ``count`` largest of each row, largest first, the lower index first among equals."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]


def sort_pairs(index, experts):
    """See ``deepseek_v3.kernels.sort_pairs``."""
    flat = index.reshape(-1).clamp(max=experts)
    order = torch.sort(flat, stable=True).indices
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    bounds = torch.arange(experts + 1, device=flat.device)
    offsets = torch.searchsorted(flat[order].contiguous(), bounds.to(flat.dtype))
    return order.int(), inverse.int(), offsets.int()


def gather_rows(x, order, top_k):
    """Row of each sorted pair's token: [T, D] -> [P, D]."""
    return x[order.long() // top_k]


def combine(y, inverse, offsets, weights, tokens):
    """Sum of each token's pairs, weighted where ``weights`` [T, K] is given: [P, D] -> [T, D]."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    place = inverse.long().view(tokens, -1)  # [T, K]
    dead = place >= offsets[-1]
    rows = y[place].to(wide).masked_fill(dead[..., None], 0)  # [T, K, D]
    if weights is not None:
        rows = rows * weights.to(wide).masked_fill(dead, 0)[..., None]
    return rows.sum(1).to(y.dtype)


def _segments(offsets):
    bounds = offsets.tolist()
    return [(e, slice(bounds[e], bounds[e + 1])) for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]


def grouped_gemm(x, w, offsets, transposed):
    """See ``deepseek_v3.kernels.grouped_gemm``; rows of no expert are zeros here."""
    out = w.new_zeros(x.shape[0], w.shape[2] if transposed else w.shape[1])
    for e, rows in _segments(offsets):
        out[rows] = x[rows].to(w.dtype) @ (w[e] if transposed else w[e].t())
    return out


def grouped_wgrad(dy, x, offsets, dtype):
    """See ``deepseek_v3.kernels.grouped_wgrad``."""
    out = torch.zeros(offsets.numel() - 1, dy.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for e, rows in _segments(offsets):
        left, right = (t[rows].to(torch.promote_types(dy.dtype, x.dtype)) for t in (dy, x))
        out[e] = (left.t() @ right).to(dtype)
    return out
