"""RMSNorm, rotary embedding, the write of latents and SwiGLU against float64 formulas with complex rotations."""

import math

import pytest
import torch
from torch import library

from deepseek_v3.kernels import rms_norm, rotate, write_latents


def tolerance(dtype):
    # Two roundings of a value, and cos and sin of the same dtype.
    return {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


def norm_truth(x, weight, eps):
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def angles(batch, tokens, width, dtype):
    position = torch.rand(batch, tokens, 1, dtype=torch.float64) * 1000
    angle = position * 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    both = torch.cat((angle, angle), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate_truth(x, cos, sin, interleave):
    """Pairs as complex numbers times cos + i sin."""
    half = x.shape[-1] // 2
    pairs = (
        x.double().unflatten(-1, (half, 2)) if interleave else x.double().unflatten(-1, (2, half)).transpose(-1, -2)
    )
    turn = torch.complex(cos.double(), sin.double())[:, None, :, :half]
    turned = torch.view_as_complex(pairs.contiguous()) * turn
    return torch.cat((turned.real, turned.imag), -1)


def close(got, truth, dtype):
    assert got.isfinite().all() and got.dtype == dtype
    assert ((got.cpu().double() - truth).abs() <= tolerance(dtype) * truth.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("rows, width", [(1, 512), (3, 1536), (129, 63), (2, 7168), (0, 16)])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_rms_norm(target, rows, width, scale):
    x = (torch.randn(rows, width + 8) * scale).to(target.dtype)[:, :width]
    weight, residual = torch.randn(width).to(target.dtype), torch.randn(rows, width).to(target.dtype) * scale
    given = [t.to(target.device) for t in (x, weight, residual)]
    close(rms_norm(given[0], given[1], 1e-5, backend=target.backend), norm_truth(x, weight, 1e-5), target.dtype)
    out, total = rms_norm(given[0][None], given[1], 1e-5, residual=given[2][None], backend=target.backend)
    exact = x + residual
    assert torch.equal(total[0].cpu(), exact)
    close(out[0], norm_truth(exact, weight, 1e-5), target.dtype)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(
    "batch, heads, tokens, width, shared", [(1, 1, 1, 64, False), (2, 5, 3, 64, True), (3, 2, 4, 6, False)]
)
def test_rotate(target, batch, heads, tokens, width, shared, interleave):
    x = torch.randn(batch, tokens, heads, width + 4).to(target.dtype)[..., 4:].transpose(1, 2)
    cos, sin = angles(1 if shared else batch, tokens, width, target.dtype)
    got = rotate(*(t.to(target.device) for t in (x, cos, sin)), interleave=interleave, backend=target.backend)
    assert got.shape == x.shape
    close(got, rotate_truth(x, cos, sin, interleave), target.dtype)


@pytest.mark.parametrize("interleave", [True, False])
def test_write_latents(target, interleave):
    batch, tokens, slots, rank, width = 2, 3, 7, 48, 16
    storage = torch.full((batch, 1, slots, rank + width + 8), math.nan).to(target.dtype).to(target.device)
    latent, rope = storage[:, 0, :, :rank], storage[:, 0, :, rank : rank + width]
    compressed = torch.randn(batch, tokens, rank + width).to(target.dtype)
    weight, (cos, sin) = torch.randn(rank).to(target.dtype), angles(batch, tokens, width, target.dtype)
    places = torch.tensor([[0, 5, 6], [4, 2, 1]])
    given = [t.to(target.device) for t in (compressed, weight, cos, sin, places)]
    write_latents(latent, rope, *given, eps=1e-6, interleave=interleave, backend=target.backend)
    turned = rotate_truth(compressed[:, None, :, rank:], cos, sin, interleave)[:, 0]
    for b in range(batch):
        close(latent[b, places[b]], norm_truth(compressed[b, :, :rank], weight, 1e-6), target.dtype)
        close(rope[b, places[b]], turned[b], target.dtype)
        untouched = [s for s in range(slots) if s not in places[b]]
        assert storage[b, 0, untouched].isnan().all()
    assert storage[..., rank + width :].isnan().all()


@pytest.mark.parametrize("rank", [16, 48, 128, 300, 512])
def test_write_latents_as_codes(target, rank):
    """What a plain write leaves, quantised by the formula: groups of 128 channels, the last one short."""
    batch, tokens, slots, width, groups = 2, 3, 7, 16, -(-rank // 128)
    rope_at = rank + 4 * groups
    storage = torch.full((batch, slots, rope_at + 2 * width + 8), 255, dtype=torch.uint8, device=target.device)
    codes = storage[..., :rank].view(torch.float8_e4m3fn)
    scale = storage[..., rank:rope_at].view(torch.float32)
    plain = torch.zeros(batch, slots, rank + width).to(target.dtype).to(target.device)
    rope = plain.new_zeros(batch, slots, width)
    size = torch.logspace(-3, 2, rank)
    compressed = torch.cat((torch.randn(batch, tokens, rank) * size, torch.randn(batch, tokens, width)), -1)
    compressed[0, 1, :rank] = 0
    compressed, weight = compressed.to(target.dtype), torch.randn(rank).to(target.dtype)
    places = torch.tensor([[0, 5, 6], [4, 2, 1]])
    given = [t.to(target.device) for t in (compressed, weight, *angles(batch, tokens, width, target.dtype), places)]
    write_latents(plain[..., :rank], plain[..., rank:], *given, backend=target.backend)
    write_latents(codes, rope, *given, scale=scale, backend=target.backend)
    assert torch.equal(rope, plain[..., rank:])
    for b in range(batch):
        for s in range(slots):
            if s not in places[b]:
                assert (storage[b, s] == 255).all()
                continue
            for g in range(groups):
                part = slice(g * 128, min(rank, g * 128 + 128))
                value = plain[b, s, part].float().cpu()
                step = value.abs().max().clamp(min=448 * 2.0**-126) / 448
                assert scale[b, s, g].item() == step.item()
                expected = (value / step).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert torch.equal(codes[b, s, part].cpu().float(), expected.float())
    assert (storage[..., rope_at:] == 255).all()


def test_operations_have_fakes(target):
    x, weight = torch.randn(2, 3, 64), torch.randn(64)
    cos, sin = angles(2, 3, 16, target.dtype)
    x, weight, cos, sin = (t.to(target.dtype).to(target.device) for t in (x, weight, cos, sin))
    cache = torch.zeros(2, 5, 64, device=target.device, dtype=target.dtype)
    slots = torch.tensor([[0, 1, 2], [2, 3, 4]], device=target.device)
    ops, b = torch.ops.deepseek_v3, target.backend
    for operation, arguments in {
        ops.rms_norm: (x, weight, 1e-6, x.clone(), b),
        ops.rotate: (x[:, None, :, :16], cos, sin, True, b),
        ops.swiglu: (*torch.cat((x, x), -1).chunk(2, -1), x, b),
        ops.write_latents_: (
            cache, cache.new_zeros(2, 5, 16), torch.cat((x, x[..., :16]), -1), weight, 1e-6, cos, sin, slots,
            True, None, b,
        ),
    }.items():  # fmt: skip
        library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_gradients_flow_through_the_reference():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 8), (8,)))
    cos, sin = angles(2, 4, 8, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rotate(rms_norm(x, w), cos, sin), (x, weight))
    with pytest.raises(RuntimeError, match="no gradient"):
        rms_norm(x, weight, backend="triton")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(5)), "weight"),
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(4), residual=torch.ones(2, 5)), "residual"),
        (lambda: rotate(torch.ones(1, 2, 3, 5), torch.ones(1, 3, 5), torch.ones(1, 3, 5)), "B, H, T, R"),
        (lambda: write(torch.zeros(1, 2)), "slots"),
        (lambda: write(torch.zeros(1, 1).long(), rank=5), "does not fit"),
        (lambda: write(torch.zeros(1, 1).long(), grad=True), "no gradient"),
        (lambda: write(torch.zeros(1, 1).long(), scale=torch.ones(1, 3, 1)), "scale must be"),
        (lambda: write(torch.zeros(1, 1).long(), dtype=torch.float8_e4m3fn), "scale must be"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def write(slots, rank=4, grad=False, dtype=torch.float32, scale=None):
    compressed = torch.ones(1, 1, 6, requires_grad=grad)
    turn = torch.ones(1, 1, 2)
    latent, rope = torch.ones(1, 3, rank).to(dtype), torch.ones(1, 3, 2)
    write_latents(latent, rope, compressed, torch.ones(rank), turn, turn, slots, scale=scale)
