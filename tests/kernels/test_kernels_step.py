"""The joined steps of a decode layer against float64 formulas: rotations are complex numbers, products einsums."""

import math

import pytest
import torch
from torch import library

from deepseek_v3.kernels import absorb_outputs, absorb_queries, norm_and_write, rope_angles


def tolerance(dtype):
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


def close(got, truth, dtype):
    assert got.isfinite().all() and got.dtype == dtype and got.shape == truth.shape
    error = (got.cpu().double() - truth).abs()
    assert (error <= tolerance(dtype) * truth.abs().clamp(min=1.0)).all(), error.max()


def turned_truth(x, cos, sin, interleave):
    """x [.., R] turned by cos, sin that broadcast against it."""
    half = x.shape[-1] // 2
    x = x.double()
    pairs = x.unflatten(-1, (half, 2)) if interleave else x.unflatten(-1, (2, half)).transpose(-1, -2)
    turn = torch.complex(cos.double(), sin.double())[..., :half]
    turned = torch.view_as_complex(pairs.contiguous()) * turn
    return torch.cat((turned.real, turned.imag), -1)


def norm_truth(x, weight, eps):
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def angles(batch, tokens, width, dtype):
    angle = torch.rand(batch, tokens, width // 2, dtype=torch.float64) * 7
    both = torch.cat((angle, angle), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("batch, tokens, width, factor", [(1, 1, 64, 1.0), (3, 2, 20, 1.3)])
def test_rope_angles(target, batch, tokens, width, factor):
    positions = torch.randint(0, 163840, (batch, tokens))
    frequencies = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    given = positions.to(target.device), frequencies.to(target.device)
    cos, sin = rope_angles(*given, factor, target.dtype, backend=target.backend)
    # The angle is a float32 product; what is tested is its cosine and sine, for which float64 is the judge.
    angle = (positions[..., None].float() * frequencies).double().repeat(1, 1, 2)
    close(cos, angle.cos() * factor, target.dtype)
    close(sin, angle.sin() * factor, target.dtype)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("batch, shared, rank, width, low", [(2, False, 48, 16, 24), (1, True, 512, 64, 96)])
def test_norm_and_write(target, batch, shared, rank, width, low, interleave):
    tokens, slots = 3, 7
    storage = torch.full((batch, 1, slots, rank + width + 8), math.nan).to(target.dtype).to(target.device)
    latent, rope = storage[:, 0, :, :rank], storage[:, 0, :, rank : rank + width]
    query = torch.randn(batch, tokens, low + 3).to(target.dtype)[..., :low]
    compressed = torch.randn(batch, tokens, rank + width).to(target.dtype)
    low_weight, weight = torch.randn(low).to(target.dtype), torch.randn(rank).to(target.dtype)
    cos, sin = angles(1 if shared else batch, tokens, width, target.dtype)
    places = torch.tensor([[0, 5, 6], [4, 2, 1]])[:batch]
    given = [t.to(target.device) for t in (query, low_weight, compressed, weight, cos, sin, places)]
    where = (*given[:2], latent, rope, *given[2:])
    out = norm_and_write(*where, low_eps=1e-5, eps=1e-6, interleave=interleave, backend=target.backend)
    close(out, norm_truth(query, low_weight, 1e-5), target.dtype)
    turned = turned_truth(compressed[..., rank:], cos, sin, interleave)
    for b in range(batch):
        close(latent[b, places[b]], norm_truth(compressed[b, :, :rank], weight, 1e-6), target.dtype)
        close(rope[b, places[b]], turned[b], target.dtype)
        assert storage[b, 0, [s for s in range(slots) if s not in places[b]]].isnan().all()
    assert storage[..., rank + width :].isnan().all()


@pytest.mark.parametrize("rank", [48, 300, 512])
def test_norm_and_write_as_codes(target, rank):
    """What a plain write leaves, quantised by the formula; the slots lie as in a cache of bytes."""
    tokens, slots, width, low, groups = 3, 7, 16, 24, -(-rank // 128)
    storage = torch.full((1, slots, rank + 4 * groups + 12), 255, dtype=torch.uint8, device=target.device)
    codes = storage[..., :rank].view(torch.float8_e4m3fn)
    scale = storage[..., rank : rank + 4 * groups].view(torch.float32)
    compressed = torch.randn(1, tokens, rank + width) * torch.logspace(-3, 2, rank + width)
    query, places = torch.randn(1, tokens, low), torch.tensor([[4, 2, 1]])
    weights = torch.randn(low), torch.randn(rank)
    query, low_weight, compressed, weight = (x.to(target.dtype) for x in (query, weights[0], compressed, weights[1]))
    given = [t.to(target.device) for t in (compressed, weight, *angles(1, tokens, width, target.dtype), places)]
    ours = [t.to(target.device) for t in (query, low_weight)]
    plain, ropes = given[0].new_zeros(1, slots, rank), given[0].new_zeros(2, 1, slots, width)
    expected = norm_and_write(*ours, plain, ropes[0], *given, backend=target.backend)
    out = norm_and_write(*ours, codes, ropes[1], *given, scale=scale, backend=target.backend)
    assert torch.equal(out, expected) and torch.equal(*ropes)
    for s in range(slots):
        if s not in places[0]:
            assert (storage[0, s] == 255).all()
            continue
        for group, part in enumerate(plain[0, s].float().cpu().split(128)):
            step = part.abs().max() / 448
            assert scale[0, s, group].item() == step.item()
            wanted = (part / step).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            assert torch.equal(codes[0, s].cpu().float().split(128)[group], wanted)
    assert (storage[..., rank + 4 * groups :] == 255).all()


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(
    "batch, tokens, heads, nope, rope, value, rank, shared",
    [(1, 1, 4, 128, 64, 128, 512, True), (3, 2, 3, 24, 8, 40, 48, False), (35, 2, 2, 16, 16, 16, 32, False)],
)
def test_absorbing(target, batch, tokens, heads, nope, rope, value, rank, shared, interleave):
    q = torch.randn(batch, tokens, heads, nope + rope).to(target.dtype)
    weight = (torch.randn(heads * (nope + value), rank) / nope**0.5).to(target.dtype)
    cos, sin = angles(1 if shared else batch, tokens, rope, target.dtype)
    given = [t.to(target.device) for t in (q, weight, cos, sin)]
    latent, turned = absorb_queries(*given, interleave=interleave, backend=target.backend)
    whole = weight.double().view(heads, nope + value, rank)
    close(latent, torch.einsum("bthn,hnc->bthc", q[..., :nope].double(), whole[:, :nope]), target.dtype)
    close(turned, turned_truth(q[..., nope:], cos[:, :, None], sin[:, :, None], interleave), target.dtype)
    mixed = (torch.randn(batch, tokens, heads, rank) / rank**0.5).to(target.dtype)
    out = absorb_outputs(mixed.to(target.device), given[1], value, backend=target.backend)
    close(out, torch.einsum("bthc,hvc->bthv", mixed.double(), whole[:, nope:]), target.dtype)


def test_operations_have_fakes(target):
    x = torch.randn(2, 3, 24).to(target.dtype).to(target.device)
    cos, sin = (t.to(target.device) for t in angles(2, 3, 8, target.dtype))
    q, weight = x.view(2, 3, 1, 24).repeat(1, 1, 2, 1), x.new_ones(2 * (16 + 8), 32)
    cache, slots = x.new_zeros(2, 5, 16), torch.tensor([[0, 1, 2], [2, 3, 4]], device=target.device)
    ops, b = torch.ops.deepseek_v3, target.backend
    for operation, arguments in {
        ops.rope_angles: (slots, torch.ones(4, device=target.device), 1.0, target.dtype, b),
        ops.norm_and_write_: (
            x, x.new_ones(24), 1e-6, cache, x.new_zeros(2, 5, 8), x.clone(), x.new_ones(16), 1e-6, cos, sin, slots,
            True, None, b,
        ),
        ops.absorb_queries: (q, weight, cos, sin, True, b),
        ops.absorb_outputs: (q.new_ones(2, 3, 2, 32), weight, 8, b),
    }.items():  # fmt: skip
        library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


def cache_of(x):
    return x[..., :4], x[..., 4:], x


def slots_of(x):
    return torch.zeros(x.shape[:2], dtype=torch.int64)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: rope_angles(x, x[0], 1.0, torch.float32), "B, T"),
        (lambda x: norm_and_write(x, x[0, 0], *[x] * 7), "slots|does not fit"),
        (lambda x: norm_and_write(x, x[0, 0, 1:], *[x] * 7), "do not fit compressed"),
        (lambda x: norm_and_write(x, x[0, 0], *cache_of(x), *[x] * 3, slots_of(x), scale=x), "scale must be"),
        (lambda x: absorb_queries(x[:, :, None], x[0], x[:, 1:], x[:, 1:]), "B, T, H"),
        (lambda x: absorb_outputs(x[:, :, None], x[0, :, 1:], 4), "B, T, H, C"),
        (lambda x: absorb_outputs(x[:, :, None].requires_grad_(), x[0], 2), "no gradient"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.ones(2, 4, 6))
