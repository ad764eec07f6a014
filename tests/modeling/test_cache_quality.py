"""What FP8 latents cost: each number within half a step of E4M3, attention within what such steps come to."""

import math

import pytest
import torch

from deepseek_v3 import LatentCache
from deepseek_v3.configuration import preset
from deepseek_v3.kernels import mla_decode

FP8 = torch.float8_e4m3fn
HALF_STEP = 2.0**-4  # of a number whose mantissa has 3 bits, at most, relative to it
LEAST = 2.0**-10 / 448  # half the step of subnormal codes, relative to the largest of the 128 channels


def latents(*shape, spread):
    """Normal numbers in channels of sizes that differ by e**spread, rounded to BF16."""
    generator = torch.Generator().manual_seed(int(10 * spread))
    size = torch.exp(torch.randn(shape[-1], generator=generator) * spread)
    return (torch.randn(shape, generator=generator) * size).bfloat16()


def held(latent, rope, coded):
    """What a layer of DeepSeek-V3's sizes keeps of [B, S, C] and [B, S, R]."""
    cache = LatentCache(preset("deepseek-v3"), dtype=FP8 if coded else None)
    cache.update(latent[:, None], rope[:, None], 0)
    layer = cache.layers[0]
    return layer.format.parts(layer._storage[:, 0, : latent.shape[1]])


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_each_number_is_within_half_a_step(spread):
    latent, rope = latents(2, 40, 512, spread=spread), latents(2, 40, 64, spread=0.0)
    kept = held(latent, rope, coded=True)
    assert torch.equal(kept.rope, rope)
    value = kept.latent.double() * kept.scale.double().repeat_interleave(128, -1)
    exact = latent.double()
    largest = exact.unflatten(-1, (4, 128)).abs().amax(-1).repeat_interleave(128, -1)
    # The scale is a float32, by which a number is divided in float32.
    allowed = torch.maximum(exact.abs() * HALF_STEP, largest * LEAST) * (1 + 1e-5) + exact.abs() * 1e-6
    error = (value - exact).abs()
    assert (error <= allowed).all()
    assert error.norm() > 0.1 * allowed.norm()  # it is E4M3, and no wider format
    plain, keys = kept.plain()
    assert torch.equal(plain, value.to(torch.bfloat16)) and torch.equal(keys, rope)


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("window", [None, 64])
def test_attention_is_within_what_the_rounding_comes_to(spread, window):
    """Errors of single numbers are independent and within half a step, h, so at most h / sqrt(3) in the mean square:
    of the values as they are, and as noise on each logit, which moves weights by its own size."""
    batch, slots, heads = 3, 400, 16
    latent, rope = latents(batch, slots, 512, spread=spread), latents(batch, slots, 64, spread=0.0)
    generator = torch.Generator().manual_seed(5)
    q_latent = torch.randn(batch, 1, heads, 512, generator=generator) / latent.float().square().mean().sqrt()
    q_latent, q_rope = q_latent.bfloat16(), torch.randn(batch, 1, heads, 64, generator=generator).bfloat16()
    scale = 576**-0.5
    # In float32, so that the error is the codes' alone.
    wide = [x.float() for x in (q_latent, q_rope)]
    kept = held(latent, rope, coded=True)
    options = {"scale": scale, "sliding_window": window}
    ours = mla_decode(*wide, kept.latent, rope.float(), latent_scale=kept.scale, **options)[0].double()
    shown = slice(None) if window is None else slice(slots - window, None)
    keys, values = torch.cat((latent, rope), -1).double()[:, shown], latent.double()[:, shown]
    logits = torch.einsum("bthc,bsc->bths", torch.cat((q_latent, q_rope), -1).double(), keys) * scale
    weights = logits.softmax(-1)
    exact = torch.einsum("bths,bsc->bthc", weights, values)
    products = (q_latent.double()[..., None, :] * values[:, None, None]).square().sum(-1)  # of one number each
    noise = (weights**2 * products).sum() / (weights**2).sum() * scale**2
    bound = HALF_STEP / math.sqrt(3) * (1 + noise).sqrt()
    relative = (ours - exact).norm() / exact.norm()
    assert 0.3 * bound < relative < bound
    plain = mla_decode(*wide, latent.float(), rope.float(), **options)[0].double()
    assert (plain - exact).norm() / exact.norm() < 1e-5  # the formula above is the kernel's
