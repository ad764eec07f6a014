"""The codec against formulas written here in float64, and against the package's own quantisers bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.conversion.codec import BadValues, decode, encode, prepare_worker, widen
from deepseek_v3.kernels import dequantize_weight, quantize_weight

SHAPES = [(128, 128), (576, 200), (130, 1), (1, 300), (256, 1408), (100, 129)]
FEW = settings(max_examples=20, deadline=None)


def bits_of(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16)


def e4m3(code):
    """The value of a code in float64, from the format's definition: bias 7, no infinities."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


VALUES = np.array([e4m3(code) for code in range(256)])


def spread(scale, rows, columns):
    return np.repeat(np.repeat(scale, 128, 0)[:rows], 128, 1)[:, :columns]


def round_to_bf16(values):
    """Float64 to BF16 bits through float32, to nearest with ties to even, in integers."""
    raw = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


def random_codes(generator, rows, columns):
    codes = generator.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    return codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_decode_is_the_float64_product_rounded(shape, seed):
    generator = np.random.default_rng(seed)
    codes = random_codes(generator, *shape)
    scale = np.exp(generator.normal(-5, 8, (-(-shape[0] // 128), -(-shape[1] // 128)))).astype(np.float32)
    exact = VALUES[codes] * spread(scale.astype(np.float64), *shape)
    result = decode(codes, scale)
    assert np.array_equal(result, round_to_bf16(exact))
    # And so it lies within half a unit in the last place of the exact product.
    error = np.abs((result.astype(np.uint32) << 16).view(np.float32).astype(np.float64) - exact)
    assert (error <= np.abs(exact) * 2.0**-8 * (1 + 2.0**-14) + 2.0**-134).all()
    reference = dequantize_weight(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale))
    assert np.array_equal(result, bits_of(reference))


def test_every_code_is_decoded():
    codes = np.array([[code for code in range(256) if code & 0x7F != 0x7F]], np.uint8)
    scale = np.array([[0.75, 2.0**-20]], np.float32)
    assert np.array_equal(
        decode(codes, scale), round_to_bf16(VALUES[codes] * spread(scale.astype(np.float64), 1, 254))
    )


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused(code):
    codes = np.zeros((129, 129), np.uint8)
    codes[128, 128] = code
    with pytest.raises(BadValues):
        decode(codes, np.ones((2, 2), np.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("seed", range(2))
def test_encode_by_the_report_s_formula(shape, scale_fmt, seed):
    generator = torch.Generator().manual_seed(seed)
    spreads = torch.exp(4 * torch.randn(shape, generator=generator))
    weights = (torch.randn(shape, generator=generator) * spreads * 1e-3).bfloat16()
    codes, scale = encode(bits_of(weights), scale_fmt)
    values = weights.double().numpy()
    padded = np.zeros((scale.shape[0] * 128, scale.shape[1] * 128))
    padded[: shape[0], : shape[1]] = np.abs(values)
    amax = padded.reshape(scale.shape[0], 128, scale.shape[1], 128).max((1, 3))
    expected = (amax.astype(np.float32) / np.float32(448)).astype(np.float32)
    if scale_fmt:
        expected = (2.0 ** np.ceil(np.log2(expected.astype(np.float64)))).astype(np.float32)
    assert np.array_equal(scale, expected)
    # The nearest code, by looking at all of them; float32 divides before rounding, hence the hair's breadth.
    quotient = values / spread(scale.astype(np.float64), *shape)
    error = np.abs(VALUES[codes] - quotient)
    finite = np.sort(VALUES[:0x7F])
    place = np.clip(np.searchsorted(finite, np.abs(quotient)), 1, len(finite) - 1)
    best = np.minimum(np.abs(finite[place] - np.abs(quotient)), np.abs(np.abs(quotient) - finite[place - 1]))
    assert (error <= best + np.abs(quotient) * 2.0**-22).all()
    reference = quantize_weight(weights, scale_fmt=scale_fmt)
    assert np.array_equal(codes, reference[0].view(torch.uint8).numpy())
    assert np.array_equal(scale, reference[1].numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(value):
    weights = torch.randn(130, 140).bfloat16()
    weights[129, 139] = value
    with pytest.raises(BadValues):
        encode(bits_of(weights), None)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_zeros_get_a_scale_that_readers_accept(scale_fmt):
    codes, scale = encode(np.zeros((128, 256), np.uint16), scale_fmt)
    assert not codes.any() and (scale > 0).all() and np.isfinite(scale).all()


@FEW
@given(seed=st.integers(0, 1 << 30), magnitude=st.integers(-20, 20), ue8m0=st.booleans())
def test_codes_come_back_through_bf16(seed, magnitude, ue8m0):
    """FP8 -> BF16 -> FP8: all codes; scales to BF16's precision, and exactly where 448 scales are a BF16 number.

    With powers of two both come back exactly where a block's largest code is above half of the range, as the
    quantiser leaves it unless that code was rounded down to exactly half.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(200, 300, generator=generator) * 2.0**magnitude
    codes, scale = quantize_weight(weights, scale_fmt="ue8m0" if ue8m0 else None)
    first = codes.view(torch.uint8).numpy()
    again, scale_again = encode(decode(first, scale.numpy()), "ue8m0" if ue8m0 else None)
    if ue8m0:
        largest = np.zeros((256, 384))
        largest[:200, :300] = np.abs(VALUES[first])
        kept = largest.reshape(2, 128, 3, 128).max((1, 3)) > 224
        assert np.array_equal(scale_again[kept], scale.numpy()[kept])
        assert np.array_equal(again[spread(kept, 200, 300)], first[spread(kept, 200, 300)])
        assert np.array_equal(decode(again, scale_again), decode(first, scale.numpy()))
        return
    assert np.array_equal(again, first)
    assert np.allclose(scale_again, scale.numpy(), rtol=2.0**-8, atol=0)
    top = (scale.double() * 448).float()
    exact = ((top.bfloat16().float() == top) & (top / 448 == scale)).numpy()
    assert np.array_equal(scale_again[exact], scale.numpy()[exact])


def test_float32_scales_of_bf16_maxima_come_back_exactly():
    weights = torch.randn(128, 128).bfloat16()
    codes, scale = quantize_weight(weights)
    again, scale_again = encode(decode(codes.view(torch.uint8).numpy(), scale.numpy()), None)
    assert np.array_equal(scale_again, scale.numpy()) and np.array_equal(again, codes.view(torch.uint8).numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_another_device_gives_the_same_bits(shape):
    """The way of every device but "cpu" goes through the kernels; here it ends on the same processor."""
    generator = np.random.default_rng(3)
    codes = random_codes(generator, *shape)
    scale = np.exp(generator.normal(-5, 2, (-(-shape[0] // 128), -(-shape[1] // 128)))).astype(np.float32)
    bits = decode(codes, scale)
    assert np.array_equal(decode(codes, scale, "cpu:0"), bits)
    for ours, theirs in zip(encode(bits, None), encode(bits, None, "cpu:0"), strict=True):
        assert np.array_equal(ours, theirs)
    codes[0, 0] = 0x7F
    with pytest.raises(BadValues):
        decode(codes, scale, "cpu:0")


def test_widening_is_exact():
    raw = np.array([[0x3F80, 0x0001, 0xFF80, 0x8000]], np.uint16)
    wide = widen(raw, "BF16").view(np.float32)
    assert wide[0, 0] == 1 and wide[0, 1] == 2.0**-133 and wide[0, 2] == -np.inf and np.signbit(wide[0, 3])
    exponents = np.arange(255, dtype=np.uint8)[None]
    assert np.array_equal(widen(exponents, "F8_E8M0").view(np.float32)[0], 2.0 ** (np.arange(255) - 127.0))


def test_flushed_subnormals_do_not_reach_the_codec():
    """A process may have switched subnormals off; codes pass through BF16 subnormals on their way."""
    torch.set_flush_denormal(True)
    try:
        prepare_worker(torch.get_num_threads())
        codes = np.arange(8, dtype=np.uint8)[None]
        assert np.array_equal(decode(codes, np.ones((1, 1), np.float32)), round_to_bf16(VALUES[codes]))
    finally:
        torch.set_flush_denormal(False)
