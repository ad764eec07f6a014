"""Launchers of the permutation and of the router."""

import torch

from .launching import Launcher, cdiv, next_power_of_2
from .permute import choose_experts, combine_pairs, count_pairs, place_pairs

choose, _combine, _count, _place = map(Launcher, (choose_experts, combine_pairs, count_pairs, place_pairs))

# Up to so many pairs one program sorts them alone, in one launch.
ALONE = 256
BLOCK = 128


def sort_pairs(index, experts):
    """See ``deepseek_v3.kernels.sort_pairs``."""
    flat = index.reshape(-1)
    pairs, device = flat.numel(), flat.device
    order, inverse = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    if pairs == 0:
        return order, inverse, offsets.zero_()
    bins = next_power_of_2(experts + 1)
    alone = pairs <= ALONE
    block = max(16, next_power_of_2(pairs)) if alone else BLOCK
    blocks = cdiv(pairs, block)
    ends = None
    if not alone:
        counts = torch.empty((experts + 1) * blocks, dtype=torch.int32, device=device)
        _count((blocks, 1, 1), (flat, counts), (pairs, experts, blocks), BLOCK=block, BINS=bins, num_warps=4)
        ends = counts.cumsum(0)
    _place(
        (blocks, 1, 1), (flat, ends, order, inverse, offsets), (pairs, experts, blocks),
        BLOCK=block, BINS=bins, ALONE=alone, num_warps=8 if alone else 4,
    )  # fmt: skip
    return order, inverse, offsets


def combine(y, inverse, offsets, weights, tokens, experts=None, shared=False, residual=None):
    """See ``deepseek_v3.kernels.reference.experts.combine``.

    offsets None: the pairs lie in order, and inverse [T, K] holds their experts, of which ``experts`` are here.
    shared: a row for each token follows the pairs in y and is added, and so is the residual [T, D], if any.
    """
    width, pairs = y.shape[1], inverse.numel()
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    if out.numel():
        block = min(1024, next_power_of_2(width))
        _combine(
            (tokens, cdiv(width, block), 1), (y, inverse, offsets, weights, residual, out),
            (offsets.numel() - 1 if experts is None else experts, width, y.stride(0),
             weights.stride(0) if weights is not None else 0, pairs),
            K=pairs // tokens, BLOCK=block, WEIGHTED=weights is not None, SORTED=offsets is not None, SHARED=shared,
            ADD=residual is not None, num_warps=4,
        )  # fmt: skip
    return out


def choice(experts, stride, bias, groups, kept_groups, top_k, normalise, scaling):
    """Numbers and constants of a launch of ``choose`` over logits whose rows are `stride` apart."""
    constants = {
        "GROUPS": groups, "KEPT": kept_groups, "K": top_k, "BLOCK_G": next_power_of_2(groups),
        "BLOCK_S": next_power_of_2(experts // groups), "BLOCK_K": next_power_of_2(top_k),
        "BIASED": bias is not None, "NORMALISE": normalise, "num_warps": 1,
    }  # fmt: skip
    return (experts, stride, scaling), constants


def route(logits, bias, groups, kept_groups, top_k, normalise, scaling):
    """See ``deepseek_v3.kernels.route``."""
    tokens, experts = logits.shape
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        numbers, constants = choice(experts, logits.stride(0), bias, groups, kept_groups, top_k, normalise, scaling)
        choose((tokens, 1, 1), (logits, bias, index, weights), numbers, **constants)
    return index, weights
