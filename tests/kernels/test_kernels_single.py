"""A single token's step against float64 formulas: attention expanded over every head's own keys and values, experts
one by one."""

import math

import pytest
import torch
from test_kernels_step import angles, norm_truth, turned_truth

from deepseek_v3.kernels import (
    AttentionWeights,
    Norm,
    Router,
    SingleAttention,
    SingleExperts,
    SingleMLP,
    dequantize_activation,
    experts_forward,
    is_single,
    quantize_activation,
)
from deepseek_v3.kernels.dispatch import ENVIRONMENT

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EPS = 1e-5


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def close(got, truth):
    assert got.isfinite().all() and got.shape == truth.shape
    error = (got.cpu().double() - truth).norm() / truth.norm()
    assert error < BOUND[got.dtype], error


def randn(target, *shape, scale=1.0):
    return (torch.randn(*shape) * scale).to(target.dtype).to(target.device)


def wide(*tensors):
    return [None if x is None else x.cpu().double() for x in tensors]


def silu(x):
    return x / (1 + (-x).exp())


@pytest.mark.parametrize("width, inner", [(96, 40), (200, 72)])
def test_mlp(target, width, inner):
    x, gain = randn(target, 1, 1, width), randn(target, width)
    gate, up, down = (randn(target, *shape, scale=width**-0.5) for shape in ((inner, width),) * 2 + ((width, inner),))
    layer = SingleMLP(Norm(gain, EPS), gate, up, down, backend=target.backend)
    for token in (x, 3 * x.flip(-1)):
        one, g, u, d = wide(token, gate, up, down)
        normed = norm_truth(token.cpu(), gain.cpu(), EPS)
        close(layer(token), one + (silu(normed @ g.T) * (normed @ u.T)) @ d.T)


@pytest.mark.parametrize("experts, groups, kept, top_k, scaling", [(16, 4, 2, 4, 2.5), (6, 1, 1, 3, 1.0)])
def test_experts(target, experts, groups, kept, top_k, scaling):
    width, inner, shared = 96, 40, 72
    x, gain, score = randn(target, 1, 1, width), randn(target, width), randn(target, experts, width, scale=0.2)
    bias = torch.randn(experts).to(target.device)
    gate_up, down = (
        randn(target, experts, 2 * inner, width, scale=0.1),
        randn(target, experts, width, inner, scale=0.2),
    )
    own = [randn(target, *shape, scale=0.1) for shape in ((shared, width), (shared, width), (width, shared))]
    router = Router(score, bias, groups, kept, top_k, True, scaling)
    got = SingleExperts(Norm(gain, EPS), router, gate_up, down, tuple(own), backend=target.backend)(x)

    one, weight, b, up, dn, *mine = wide(x, score, bias, gate_up, down, *own)
    normed = norm_truth(x.cpu(), gain.cpu(), EPS)[0, 0]
    scores = 1 / (1 + (-(weight @ normed)).exp())
    grouped = (scores + b).view(groups, -1)
    best = grouped.topk(2).values.sum(-1).topk(kept).indices
    open_ = torch.full_like(grouped, -math.inf).index_copy(0, best, grouped[best]).flatten()
    chosen = open_.topk(top_k).indices
    truth = silu(mine[0] @ normed) * (mine[1] @ normed) @ mine[2].T
    for e in chosen:
        gate, two = (up[e] @ normed).chunk(2)
        truth = truth + scores[e] / scores[chosen].sum() * scaling * (dn[e] @ (silu(gate) * two))
    close(got, one + truth)


def attention_weights(target, width, heads, low, rank, turning, nope, value):
    def norm(size):
        return Norm(randn(target, size), EPS)

    def matrix(out, into):
        return randn(target, out, into, scale=into**-0.5)

    return AttentionWeights(
        norm(width),
        None if low is None else matrix(low, width),
        None if low is None else norm(low),
        matrix(rank + turning, width),
        norm(rank),
        matrix(heads * (nope + turning), low or width),
        matrix(heads * (nope + value), rank),
        matrix(width, heads * value),
    )


def attention_truth(x, weights, heads, latent, rope, cos, sin, seen, scale, interleave, coded=False):
    """Output and the new token's latent and key; latent, rope: float64, the new token's at the end to be replaced
    (coded: but for its latent, which is what its codes stand for)."""
    norm, q_a, q_norm, kv_a, kv_norm, q_b, kv_b, o = weights
    normed = norm_truth(x.cpu(), norm.weight.cpu(), EPS)[0, 0]
    low = normed if q_a is None else norm_truth(q_a.cpu().double() @ normed, q_norm.weight.cpu(), EPS)
    turning, rank = cos.shape[2], latent.shape[1]
    query = (q_b.cpu().double() @ low).view(heads, -1)
    nope = query.shape[1] - turning
    new = kv_a.cpu().double() @ normed
    own_latent = norm_truth(new[:rank], kv_norm.weight.cpu(), EPS)
    own_key = turned_truth(new[rank:], cos[0, 0].cpu(), sin[0, 0].cpu(), interleave)
    rope = torch.cat((rope[:-1], own_key[None]))
    if not coded:
        latent = torch.cat((latent[:-1], own_latent[None]))
    expanded = (latent @ kv_b.cpu().double().T).view(len(latent), heads, -1)
    logits = torch.einsum("hn,shn->hs", query[:, :nope], expanded[..., :nope])
    turned = turned_truth(query[:, nope:], cos[0].cpu(), sin[0].cpu(), interleave)
    logits = (logits + torch.einsum("hr,sr->hs", turned, rope)) * scale
    logits[:, [s not in seen for s in range(len(latent))]] = -math.inf
    mixed = torch.einsum("hs,shv->hv", logits.softmax(-1), expanded[..., nope:])
    return x.cpu().double() + (o.cpu().double() @ mixed.flatten()).view(1, 1, -1), own_latent, own_key


@pytest.mark.parametrize("low", [24, None])
@pytest.mark.parametrize(
    ("slots", "start", "window", "interleave", "shape"),
    [
        (5, None, None, True, (3, 32, 16, 24, 20)),
        (130, None, None, False, (3, 32, 16, 24, 20)),
        (150, 90, None, True, (4, 64, 32, 16, 40)),
        (100, None, 70, True, (5, 256, 64, 20, 40)),
    ],
)
def test_attention(target, low, slots, start, window, interleave, shape):
    heads, rank, turning, nope, value = shape
    width, scale = 96, 0.1
    x, weights = randn(target, 1, 1, width), attention_weights(target, width, heads, low, rank, turning, nope, value)
    storage = randn(target, 1, slots + 3, rank + turning)
    before = storage.clone()
    storage[:, slots - 1 :] = math.nan
    latent, rope = storage[:, :slots, :rank], storage[:, :slots, rank:]
    cos, sin = (each.to(target.device) for each in angles(1, 1, turning, target.dtype))
    place = torch.tensor([[slots - 1]], device=target.device)
    starts = None if start is None else torch.tensor([start], dtype=torch.int32, device=target.device)
    layer = SingleAttention(weights, heads, softmax_scale=scale, interleave=interleave, backend=target.backend)
    got = layer(x, latent, rope, (cos, sin), place, starts=starts, sliding_window=window)
    first = max(start or 0, 0 if window is None else slots - window)
    held = wide(before[0, :slots, :rank], before[0, :slots, rank:])
    truth, own_latent, own_key = attention_truth(
        x, weights, heads, *held, cos, sin, range(first, slots), scale, interleave
    )
    close(got, truth)
    close(latent[0, -1], own_latent)
    close(rope[0, -1], own_key)
    assert storage[:, slots:].isnan().all() and torch.equal(storage[:, : slots - 1], before[:, : slots - 1])


def test_attention_as_the_cache_grows(target):
    """One object over a longer and longer cache, and over another in between: as an object of its own each time."""
    heads, rank, turning, nope, value = 3, 32, 16, 16, 8
    weights = attention_weights(target, 40, heads, 40, rank, turning, nope, value)
    kept = SingleAttention(weights, heads, softmax_scale=0.2, backend=target.backend)
    cos, sin = (each.to(target.device) for each in angles(1, 1, turning, target.dtype))
    for slots, room in ((1, 8), (2, 8), (64, 64), (65, 130), (129, 130), (65, 130)):
        x, storage = randn(target, 1, 1, 40), randn(target, 1, room, rank + turning)
        place = torch.tensor([[slots - 1]], device=target.device)
        results = []
        for layer in (kept, SingleAttention(weights, heads, softmax_scale=0.2, backend=target.backend)):
            own = storage.clone()
            results.append(layer(x, own[:, :slots, :rank], own[:, :slots, rank:], (cos, sin), place))
        assert results[0].isfinite().all() and torch.equal(*results), slots


@pytest.mark.parametrize("low", [24, None])
def test_attention_over_codes(target, low):
    """The codes of the new token are those of its latent, and attention reads what codes stand for."""
    heads, rank, turning, nope, value, slots = 3, 128, 16, 24, 20, 70
    x, weights = randn(target, 1, 1, 96), attention_weights(target, 96, heads, low, rank, turning, nope, value)
    plain, rope = randn(target, 1, slots, rank), randn(target, 1, slots, turning)
    codes, scale = quantize_activation(plain, group=128)
    cos, sin = (each.to(target.device) for each in angles(1, 1, turning, target.dtype))
    place = torch.tensor([[slots - 1]], device=target.device)
    layer = SingleAttention(weights, heads, softmax_scale=0.2, backend=target.backend)
    got = layer(x, codes, rope, (cos, sin), place, scale=scale)
    held = wide(dequantize_activation(codes, scale, group=128, dtype=torch.float32)[0], rope[0])
    arguments = (x, weights, heads, *held, cos, sin, range(slots), 0.2, True)
    truth, own_latent, _ = attention_truth(*arguments, coded=True)
    assert ((held[0][-1] - own_latent).norm() / own_latent.norm()) < 0.05
    close(got, truth)


@pytest.mark.parametrize("foreign", [False, True])
def test_one_tokens_experts_alone(target, foreign):
    class Stacks:
        gate_up_proj, down_proj = randn(target, 6, 80, 96, scale=0.1), randn(target, 6, 96, 40, scale=0.2)
        act_fn = torch.nn.functional.silu

    hidden, index = randn(target, 1, 96), torch.tensor([[4, 6 if foreign else 0, 5]], device=target.device)
    share = torch.rand(1, 3).to(target.device)
    got = experts_forward(Stacks, hidden, index, share, target.backend)
    one, up, down, part = wide(hidden, Stacks.gate_up_proj, Stacks.down_proj, share)
    truth = torch.zeros(1, 96, dtype=torch.float64)
    for e, factor in zip(index[0].tolist(), part[0], strict=True):
        if e < 6:
            gate, two = (one @ up[e].T).chunk(2, -1)
            truth += factor * (silu(gate) * two) @ down[e].T
    close(got, truth)


def test_a_tensor_at_an_odd_address(target):
    """What is known of the first call's addresses says nothing of this one's."""
    gate, up, down = (randn(target, 96, 96, scale=0.1) for _ in range(3))
    layer = SingleMLP(Norm(randn(target, 96), EPS), gate, up, down, backend=target.backend)
    x = randn(target, 1, 1, 96)
    odd = torch.cat((x[..., :1], x), -1)[..., 1:]
    assert torch.equal(layer(x), layer(odd)) and torch.equal(layer(odd), layer(x))


def test_which_tokens_are_single(monkeypatch):
    assert is_single(torch.zeros(1, 1, 8)) and not is_single(torch.zeros(1, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_single(torch.zeros(1, 1, 8))
    with torch.enable_grad():
        assert not is_single(torch.zeros(1, 1, 8))
    monkeypatch.setenv(ENVIRONMENT, "fp8_gemm=torch")
    assert is_single(torch.zeros(1, 1, 8))
    monkeypatch.setenv(ENVIRONMENT, "mla_decode=torch")
    assert not is_single(torch.zeros(1, 1, 8))


def test_what_does_not_fit_is_refused():
    norm, square, flat = Norm(torch.ones(8), EPS), torch.ones(8, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="do not fit"):
        SingleMLP(norm, square, square, flat)
    with pytest.raises(ValueError, match="one token"):
        SingleMLP(norm, square, square, square)(torch.zeros(2, 1, 8))
    weights = AttentionWeights(norm, None, None, flat, Norm(torch.ones(2), EPS), square, torch.ones(8, 2), square)
    with pytest.raises(ValueError, match="3 heads"):
        SingleAttention(weights, 3, softmax_scale=1.0)
    layer = SingleAttention(weights, 2, softmax_scale=1.0)
    with pytest.raises(ValueError, match="does not fit latent"):
        layer(
            torch.zeros(1, 1, 8),
            torch.ones(1, 5, 3),
            torch.ones(1, 5, 2),
            (torch.ones(1, 1, 2),) * 2,
            torch.zeros(1, 1),
        )
