"""The quantisers against formulas written here in float64 and numpy-free loops over blocks."""

import math

import pytest
import torch

from deepseek_v3.kernels import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_activation_transposed,
    quantize_weight,
    transpose_codes,
)


def blocks(rows, cols, block=(128, 128)):
    for i, r in enumerate(range(0, rows, block[0])):
        for j, c in enumerate(range(0, cols, block[1])):
            yield (i, j), (slice(r, min(r + block[0], rows)), slice(c, min(c + block[1], cols)))


def expected_scale(amax: float, scale_fmt):
    s = amax / 448.0
    return 2.0 ** math.ceil(math.log2(s)) if scale_fmt == "ue8m0" else s


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("rows, cols", [(1, 1), (63, 127), (128, 128), (129, 257), (576, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_block_has_its_own_scale_and_nearest_codes(rows, cols, scale_fmt, dtype):
    w = (torch.randn(rows, cols) * torch.logspace(-4, 3, cols)).to(dtype)
    codes, scale = quantize_weight(w, scale_fmt=scale_fmt)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == w.shape and codes.is_contiguous()
    assert scale.shape == (math.ceil(rows / 128), math.ceil(cols / 128)) and scale.dtype == torch.float32
    for (i, j), here in blocks(rows, cols):
        exact = w[here].double()
        s = expected_scale(exact.abs().max().item(), scale_fmt)
        assert scale[i, j].item() == pytest.approx(s, rel=2**-23 if scale_fmt is None else 0)
        # Half a step of E4M3: 2^-4 relative among its normal numbers, 2^-10 of the scale below 2^-6.
        error = (codes[here].double() * scale[i, j].double() - exact).abs()
        assert (error <= torch.maximum(exact.abs() * 2**-4, torch.tensor(s * 2**-10)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_an_expert_stack_is_its_matrices_one_by_one(scale_fmt):
    stack = torch.randn(2, 3, 200, 140).transpose(0, 1)
    codes, scale = quantize_weight(stack, scale_fmt=scale_fmt)
    assert scale.shape == (3, 2, 2, 2)
    for i in range(3):
        for j in range(2):
            one, one_scale = quantize_weight(stack[i, j], scale_fmt=scale_fmt)
            assert torch.equal(codes[i, j].view(torch.uint8), one.view(torch.uint8))
            assert torch.equal(scale[i, j], one_scale)
    assert torch.equal(
        dequantize_weight(codes, scale)[2, 1], dequantize_weight(codes[2, 1].contiguous(), scale[2, 1].contiguous())
    )


@pytest.mark.parametrize("block", [(128, 128), (16, 64)])
@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (3, 128, 200), (2, 2, 65, 129)])
def test_each_code_is_multiplied_by_its_blocks_scale(target, shape, block):
    codes = (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1])) + 0.1
    # Both are exact in float64, and so is their product.
    spread = scale.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    exact = codes.double() * spread[..., : shape[-2], : shape[-1]]
    there = codes.to(target.device), scale.to(target.device)
    for dtype in (target.dtype, torch.float32):
        wide = dequantize_weight(*there, block=block, dtype=dtype, backend=target.backend)
        assert wide.is_contiguous() and torch.equal(wide.cpu(), exact.float().to(dtype))
    if len(shape) == 3:
        part = dequantize_weight(
            *(tensor[1:] for tensor in there), block=block, dtype=torch.float32, backend=target.backend
        )
        assert torch.equal(part.cpu(), exact[1:].float())
        # Gate alone, out of a stack that holds both.
        joint = torch.cat([there[0], there[0]], dim=1)
        first = dequantize_weight(
            joint[:, : shape[1]], there[1], block=block, dtype=torch.float32, backend=target.backend
        )
        assert torch.equal(first.cpu(), exact.float())


@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (3, 128, 200), (2, 2, 65, 129)])
def test_codes_are_turned_byte_by_byte(target, shape):
    codes = torch.randn(shape).to(torch.float8_e4m3fn).to(target.device)
    turned = transpose_codes(codes, backend=target.backend)
    assert turned.is_contiguous() and turned.dtype == codes.dtype
    assert torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).mT)
    if len(shape) == 3:
        strided = codes[:, :, :100]
        assert torch.equal(
            transpose_codes(strided, backend=target.backend).view(torch.uint8), strided.view(torch.uint8).mT
        )


def test_slabs_do_not_change_the_result(monkeypatch):
    from deepseek_v3.kernels.reference import quantize as reference

    w = torch.randn(700, 300)
    whole = quantize_weight(w)
    monkeypatch.setattr(reference, "SLAB_ELEMENTS", 1)
    cut = quantize_weight(w)
    assert torch.equal(whole[0].view(torch.uint8), cut[0].view(torch.uint8)) and torch.equal(whole[1], cut[1])
    assert torch.equal(dequantize_weight(*whole), dequantize_weight(*cut))


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_powers_of_two_are_exact_at_the_boundary(scale_fmt):
    below, at, above = (
        torch.full((1, 128), 7.0 - 2**-21),
        torch.full((1, 128), 7.0),
        torch.full((1, 128), 7.0 + 2**-21),
    )
    scales = [quantize_activation(x, scale_fmt=scale_fmt)[1].item() for x in (below, at, above)]
    assert scales[1] == 2.0**-6
    if scale_fmt == "ue8m0":
        assert scales == [2.0**-6, 2.0**-6, 2.0**-5]
    else:
        assert scales[0] < scales[1] < scales[2]


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_zero_tiny_and_broken_blocks(scale_fmt):
    w = torch.zeros(128, 640)
    w[:, 128:256] = 2.0**-140
    w[0, 256] = float("nan")
    w[0, 384] = float("inf")
    w[:, 512:] = 1e38
    codes, scale = quantize_weight(w, scale_fmt=scale_fmt)
    assert scale[0, 0] > 0 and scale[0, 0].isfinite() and not codes[:, :128].float().any()
    assert scale[0, 1] >= torch.finfo(torch.float32).tiny and not codes[:, 128:256].float().any()
    assert codes[0, 256].float().isnan() and dequantize_weight(codes, scale)[0, 256].isnan()
    assert not dequantize_weight(codes, scale)[0, 384].isfinite()
    back = dequantize_weight(codes, scale, dtype=torch.float32)
    assert back[:, 512:].isfinite().all() and back[0, 512].item() == pytest.approx(1e38, rel=2**-4)


def test_amax_floor_bounds_the_scale_from_below():
    x = torch.full((2, 128), 1e-6)
    assert quantize_activation(x)[1][0, 0].item() == pytest.approx(1e-6 / 448, rel=1e-6)
    assert quantize_activation(x, amax_floor=1e-4)[1][0, 0].item() == pytest.approx(1e-4 / 448, rel=1e-6)
    codes, scale = quantize_weight(torch.zeros(2, 2), amax_floor=0.0)
    assert scale.item() >= torch.finfo(torch.float32).tiny and not codes.float().any()


@pytest.mark.parametrize("width", [1, 127, 128, 129, 576])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_activations_are_weights_of_one_row_blocks(width, scale_fmt):
    x = torch.randn(3, 5, width, dtype=torch.bfloat16)
    codes, scale = quantize_activation(x, scale_fmt=scale_fmt)
    assert scale.shape == (3, 5, math.ceil(width / 128))
    other, other_scale = quantize_weight(x, block=(1, 128), scale_fmt=scale_fmt)
    assert torch.equal(codes.view(torch.uint8), other.view(torch.uint8)) and torch.equal(scale, other_scale)
    back = dequantize_activation(codes, scale, dtype=torch.float32)
    assert (back - x.float()).abs().max() <= x.abs().max().float() * 2**-4


@pytest.mark.parametrize("tokens", [1, 63, 129, 300])
def test_the_transposed_form_groups_tokens(tokens):
    x = torch.randn(tokens, 70, dtype=torch.bfloat16)
    codes, scale = quantize_activation_transposed(x)
    assert codes.shape == (70, tokens) and codes.is_contiguous() and scale.shape == (70, math.ceil(tokens / 128))
    other, other_scale = quantize_weight(x, block=(128, 1))
    assert torch.equal(codes.t().contiguous().view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(scale.t(), other_scale)


def test_dequantised_values_are_float32_products_rounded_once():
    codes = torch.randn(130, 130).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) + 0.5
    out = dequantize_weight(codes, scale)
    for (i, j), here in blocks(130, 130):
        assert torch.equal(out[here], (codes[here].float() * scale[i, j]).bfloat16())


@pytest.mark.parametrize("shape", [(0, 128), (4, 0, 128), (128, 0)])
def test_empty_tensors(shape):
    codes, scale = quantize_weight(torch.empty(shape))
    assert codes.shape == shape and dequantize_weight(codes, scale).shape == shape
    assert quantize_activation(torch.empty(0, 256))[1].shape == (0, 2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: quantize_weight(torch.randn(4)), "dimensions"),
        (lambda: transpose_codes(torch.randn(4, 4)), "float8_e4m3fn"),
        (lambda: quantize_weight(torch.ones(4, 4, dtype=torch.int32)), "int32"),
        (lambda: quantize_weight(torch.randn(4, 4), scale_fmt="e8m0"), "ue8m0"),
        (lambda: quantize_activation_transposed(torch.randn(2, 3, 4)), "tokens, channels"),
        (lambda: dequantize_weight(torch.randn(4, 4), torch.ones(1, 1)), "float8_e4m3fn"),
        (lambda: dequantize_weight(torch.randn(130, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)), r"\(2, 1\)"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
