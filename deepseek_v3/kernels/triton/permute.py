"""Kernels that bring tokens into the order of their experts and back, and the router's choice.

T tokens, E experts, K experts a token, P = T * K pairs. The sort is a counting sort: histograms of blocks of pairs,
a running sum, then each pair's rank; it is stable, so it is deterministic, and needs no atomics.
"""

import triton
import triton.language as tl


@triton.jit
def count_pairs(index, counts, pairs, experts, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Histogram of one block of pairs, written transposed: counts [E + 1, blocks]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    e = tl.minimum(tl.load(index + i, mask=i < pairs, other=0), experts).to(tl.int32)
    count = tl.histogram(e, BINS, mask=i < pairs)
    tl.store(counts + bins * blocks + tl.program_id(0), count, mask=bins <= experts)


@triton.jit
def place_pairs(
    index, ends, order, inverse, offsets, pairs, experts, blocks,
    BLOCK: tl.constexpr, BINS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Sorted place of each pair of one block. ends: running sum of counts; ALONE: the only block counts for itself."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    valid = i < pairs
    e = tl.minimum(tl.load(index + i, mask=valid, other=0), experts).to(tl.int32)
    if ALONE:
        count = tl.histogram(e, BINS, mask=valid)
        begin = tl.cumsum(count, 0) - count
        tl.store(offsets + bins, begin, mask=bins <= experts)
        base = tl.gather(begin, e, 0)
    else:
        cell = e * blocks + tl.program_id(0) - 1
        base = tl.load(ends + cell, mask=valid & (cell >= 0), other=0).to(tl.int32)
        first = tl.load(ends + bins * blocks - 1, mask=(bins > 0) & (bins <= experts), other=0).to(tl.int32)
        tl.store(offsets + bins, first, mask=(bins <= experts) & (tl.program_id(0) == 0))
    # Rank among the earlier pairs of the same expert in this block; the lanes past the last pair come after it.
    rank = tl.sum(((e[:, None] == e[None, :]) & (lane[None, :] < lane[:, None])).to(tl.int32), 1)
    tl.store(inverse + i, base + rank, mask=valid)
    tl.store(order + base + rank, i, mask=valid)


@triton.jit
def combine_pairs(
    y, inverse, offsets, weights, residual, out, experts, width, y_m, w_m, pairs,
    K: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, SORTED: tl.constexpr, SHARED: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] * y[place of the pair], in float32 and in the order of k.

    SORTED: inverse holds the pairs' places; else they lie in order, and inverse holds their experts. SHARED: plus
    y[pairs + t]. ADD: plus residual[t].
    """
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(inverse + t * K + k)
        if SORTED:
            here = place < tl.load(offsets + experts)
        else:
            here = place < experts
            place = t * K + k
        live = inside & here
        value = tl.load(y + place.to(tl.int64) * y_m + col, mask=live, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + t * w_m + k, mask=here, other=0.0).to(tl.float32)
        acc += value
    if SHARED:
        acc += tl.load(y + (pairs + t) * y_m + col, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        acc += tl.load(residual + t * width + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * width + col, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def choose_experts(
    logits, bias, index, weights, experts, logits_t, scaling,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr, BIASED: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """One token: sigmoid, biased choice among the kept groups, unbiased weights. Ties go to the lower index."""
    t = tl.program_id(0).to(tl.int64)
    size = experts // GROUPS
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_S)
    # Numbers of the experts, laid out [groups, members]; padding is past the end.
    number = group[:, None] * size + member[None, :]
    real = (group < GROUPS)[:, None] & (member < size)[None, :]
    score = tl.sigmoid(tl.load(logits + t * logits_t + number, mask=real, other=0.0).to(tl.float32))
    choice = score
    if BIASED:
        choice = score + tl.load(bias + number, mask=real, other=0.0).to(tl.float32)
    choice = tl.where(real, choice, float("-inf"))
    if GROUPS > 1:
        best = tl.max(choice, 1)
        at = tl.argmax(choice, 1)
        rest = tl.max(tl.where(member[None, :] == at[:, None], float("-inf"), choice), 1)
        left = tl.where(group < GROUPS, best + tl.where(size > 1, rest, 0.0), float("-inf"))
        kept = group < 0
        for _ in tl.static_range(KEPT):
            here = group == tl.argmax(left, 0)
            kept = kept | here
            left = tl.where(here, float("-inf"), left)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    lane = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    picked = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        top = tl.max(tl.max(choice, 1), 0)
        winner = tl.min(tl.min(tl.where(choice == top, number, experts), 1), 0)
        here = number == winner
        value = tl.sum(tl.sum(tl.where(here & real, score, 0.0), 1), 0)
        chosen = tl.where(lane == k, winner, chosen)
        picked = tl.where(lane == k, value, picked)
        choice = tl.where(here, float("-inf"), choice)
    if NORMALISE:
        picked = picked / (tl.sum(picked, 0) + 1e-20)
    tl.store(index + t * K + lane, chosen.to(tl.int64), mask=lane < K)
    tl.store(weights + t * K + lane, picked * scaling, mask=lane < K)
