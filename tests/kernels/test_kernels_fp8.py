"""FP8 products against float64 sums over groups, and the quantising kernels against the torch ones bit for bit."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import library

from deepseek_v3.kernels import (
    fp8_gemm,
    grouped_fp8_gemm,
    grouped_fp8_wgrad,
    quantize_activation,
    quantize_activation_transposed,
    quantize_grouped_transposed,
    quantize_swiglu,
    quantize_weight,
)


def bits(codes):
    """Codes as integers; NaN has two, one for each sign, which stand for the same."""
    integers = codes.cpu().contiguous().view(torch.uint8)
    return torch.where(integers == 0xFF, 0x7F, integers)


def difference(got, truth):
    """One minus the cosine-like similarity of DeepSeek's own checks: 0 for equal, 1 for unrelated."""
    got, truth = got.cpu().double(), truth.double()
    return (1 - 2 * (got * truth).sum() / (got.square() + truth.square()).sum()).item()


def rough(rows, cols):
    """Random values whose rows and blocks differ in size by orders of magnitude."""
    return torch.randn(rows, cols) * torch.logspace(-3, 0, rows)[:, None] * (1 + torch.rand(cols))


def wide(codes, scale):
    """Float64 values, a group of 128 columns (and of 128 rows where the scale has fewer) at a time."""
    out = codes.cpu().double()
    tall = scale.shape[0] != codes.shape[0]
    for i in range(scale.shape[0]):
        rows = slice(i * 128, (i + 1) * 128) if tall else slice(i, i + 1)
        for j in range(scale.shape[1]):
            out[rows, j * 128 : (j + 1) * 128] *= scale[i, j].item()
    return out


def tolerance(dtype):
    return {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def assert_close(got, truth, dtype):
    assert got.isfinite().all()
    # The tensor cores add 128 products with about 14 bits before they are promoted.
    slack = 5e-4 if got.is_cuda else 0.0
    assert (got.cpu().double() - truth).abs().max() <= (tolerance(dtype) + slack) * truth.abs().max()
    assert difference(got, truth) < 1e-3


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 127), (63, 128), (129, 576), (17, 200)])
def test_activation_quantisers_agree_bit_for_bit(target, rows, width, scale_fmt):
    x = rough(rows, width + 5).to(target.dtype)[:, :width]
    x[0] = -0.0
    if rows > 16:
        x[5] *= 2.0**-125
        x[4, 3], x[7, 2] = math.nan, math.inf
    for quantise in (quantize_activation, quantize_activation_transposed):
        expected = quantise(x, scale_fmt=scale_fmt, backend="torch")
        got = quantise(x.to(target.device), scale_fmt=scale_fmt, backend=target.backend)
        assert got[0].shape == expected[0].shape and got[1].shape == expected[1].shape
        assert torch.equal(bits(got[0]), bits(expected[0]))
        assert torch.equal(got[1].cpu().nan_to_num(-1), expected[1].nan_to_num(-1))


def test_activation_scales_keep_leading_dimensions(target):
    x = torch.randn(2, 3, 256).to(target.dtype)
    codes, scale = quantize_activation(x.to(target.device), backend=target.backend)
    assert codes.shape == (2, 3, 256) and scale.shape == (2, 3, 2)
    one = quantize_activation(x[1, 2], backend="torch")
    assert torch.equal(bits(codes[1, 2]), bits(one[0])) and torch.equal(scale[1, 2].cpu(), one[1])


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(1, 1), (576, 130), (3, 129, 257)])
def test_weight_quantisers_agree_bit_for_bit(target, shape, scale_fmt):
    w = (torch.randn(shape) * torch.logspace(-3, 2, shape[-1])).to(target.dtype).transpose(-1, -2)
    w[..., ::7] *= -0.0
    expected = quantize_weight(w, scale_fmt=scale_fmt, backend="torch")
    got = quantize_weight(w.to(target.device), scale_fmt=scale_fmt, backend=target.backend)
    assert torch.equal(bits(got[0]), bits(expected[0])) and torch.equal(got[1].cpu(), expected[1])


@pytest.mark.parametrize("rows, width", [(5, 200), (130, 128)])
def test_swiglu_is_fused_with_the_quantiser(target, rows, width):
    both = torch.randn(rows, 2 * width).to(target.dtype)
    gate, up = both.double().chunk(2, dim=-1)
    truth = gate / (1 + torch.exp(-gate)) * up
    halves = both.to(target.device).chunk(2, dim=-1)
    codes, scale = quantize_swiglu(*halves, backend=target.backend)
    got = wide(codes, scale.cpu())
    # Half a step of E4M3 in each group, and the rounding of the product before it.
    largest = torch.stack([part.abs().amax(1) for part in truth.split(128, dim=1)], 1).repeat_interleave(128, 1)
    assert ((got - truth).abs() <= (2**-4 + tolerance(target.dtype)) * largest[:, :width]).all()
    assert difference(got, truth) < 1e-3
    plain = quantize_activation(truth.to(target.dtype), backend="torch")
    assert (bits(codes) != bits(plain[0])).double().mean() < 0.02


@pytest.mark.parametrize("m, n, k", [(1, 128, 128), (63, 129, 576), (127, 40, 200), (256, 576, 384)])
def test_fp8_gemm_with_weight_blocks(target, m, n, k):
    a, a_scale = quantize_activation(rough(m, k), backend="torch")
    b, b_scale = quantize_weight(rough(n, k), backend="torch")
    truth = wide(a, a_scale) @ wide(b, b_scale).t()
    inputs = [x.to(target.device) for x in (a, a_scale, b, b_scale)]
    for dtype in (target.dtype, torch.float32):
        got = fp8_gemm(*inputs, out_dtype=dtype, backend=target.backend)
        assert got.dtype == dtype
        for row, exact in zip(got.split(16), truth.split(16), strict=True):
            assert_close(row, exact, dtype)


@pytest.mark.parametrize("m, n, k", [(128, 256, 128), (72, 129, 300)])
def test_fp8_gemm_of_a_weight_gradient_adds_in_place(target, m, n, k):
    dy, dy_scale = quantize_activation_transposed(rough(k, m), backend="torch")
    x, x_scale = quantize_activation_transposed(rough(k, n), backend="torch")
    truth = wide(dy, dy_scale) @ wide(x, x_scale).t()
    inputs = [t.to(target.device) for t in (dy, dy_scale, x, x_scale)]
    assert_close(fp8_gemm(*inputs, out_dtype=torch.float32, backend=target.backend), truth, torch.float32)
    gradient = torch.randn(m, n)
    total = gradient.clone().to(target.device)
    assert fp8_gemm(*inputs, out=total, backend=target.backend) is total
    assert_close(total, truth + gradient.double(), torch.float32)


SIZES = {"ragged": [0, 1, 63, 0, 129, 300, 0], "all to one": [0, 257], "few": [1, 0, 2, 5], "nothing": [0, 0]}


def offsets_of(sizes, device="cpu"):
    return torch.tensor([0, *sizes]).cumsum(0).int().to(device)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("n, k", [(128, 256), (192, 200)])
def test_grouped_fp8_gemm(target, name, n, k):
    sizes, dead = SIZES[name], 3
    rows = sum(sizes)
    x, x_scale = quantize_activation(rough(rows + dead, k), backend="torch")
    w, w_scale = quantize_weight(torch.randn(len(sizes), n, k), backend="torch")
    got = grouped_fp8_gemm(
        *(t.to(target.device) for t in (x, x_scale, w, w_scale)), offsets_of(sizes, target.device),
        out_dtype=target.dtype, backend=target.backend,
    )  # fmt: skip
    assert got.shape == (rows + dead, n) and got.dtype == target.dtype
    start = 0
    for e, size in enumerate(sizes):
        here = slice(start, start + size)
        if size:
            assert_close(got[here], wide(x[here], x_scale[here]) @ wide(w[e], w_scale[e]).t(), target.dtype)
        start += size


@pytest.mark.parametrize("name", SIZES)
def test_grouped_quantiser_starts_a_tile_for_each_expert(target, name):
    sizes = SIZES[name]
    x = rough(sum(sizes) + 4, 70).to(target.dtype)
    x[sum(sizes) :] = math.nan
    codes, scale = quantize_grouped_transposed(
        x.to(target.device), offsets_of(sizes, target.device), scale_fmt="ue8m0", backend=target.backend
    )
    assert codes.shape == (70, scale.shape[1] * 128)
    group = 0
    for part in x[: sum(sizes)].split(sizes):
        count = math.ceil(part.shape[0] / 128)
        if count:
            expected = quantize_activation_transposed(part, scale_fmt="ue8m0", backend="torch")
            tile = bits(codes[:, group * 128 : (group + count) * 128])
            assert torch.equal(tile[:, : part.shape[0]], bits(expected[0])) and not tile[:, part.shape[0] :].any()
            assert torch.equal(scale[:, group : group + count].cpu(), expected[1])
        group += count


@pytest.mark.parametrize("name", SIZES)
def test_grouped_fp8_wgrad(target, name):
    sizes = SIZES[name]
    dy, x = rough(sum(sizes) + 4, 136), rough(sum(sizes) + 4, 72)
    dy[sum(sizes) :] = x[sum(sizes) :] = math.nan
    offsets = offsets_of(sizes)
    parts = [quantize_grouped_transposed(t, offsets, backend="torch") for t in (dy, x)]
    inputs = [t.to(target.device) for pair in parts for t in pair]
    got = grouped_fp8_wgrad(*inputs, offsets.to(target.device), backend=target.backend)
    assert got.shape == (len(sizes), 136, 72) and got.dtype == torch.float32
    start = group = 0
    for e, size in enumerate(sizes):
        count = math.ceil(size / 128)
        if size == 0:
            assert not got[e].any()
        else:
            left, right = (
                wide(c[:, group * 128 : (group + count) * 128], s[:, group : group + count]) for c, s in parts
            )
            assert_close(got[e], left @ right.t(), torch.float32)
            exact = dy[start : start + size].double().t() @ x[start : start + size].double()
            assert difference(got[e], exact) < 1e-3
        start, group = start + size, group + count


def test_operations_have_fakes(target):
    x = torch.randn(40, 256).to(target.dtype).to(target.device)
    codes, scale = quantize_activation(x, backend=target.backend)
    w, w_scale = quantize_weight(torch.randn(3, 128, 256).to(target.device), backend=target.backend)
    offsets = offsets_of([10, 0, 30], target.device)
    columns, column_scale = quantize_grouped_transposed(x, offsets, backend=target.backend)
    ops, b = torch.ops.deepseek_v3, target.backend
    for operation, arguments in {
        ops.quantize_weight: (w.float(), 128, 128, None, 0.0, b),
        ops.quantize_activation: (x, x, 128, "ue8m0", 0.0, b),
        ops.quantize_activation_transposed: (x, 128, None, 0.0, b),
        ops.quantize_grouped_transposed: (x, offsets, None, 0.0, b),
        ops.fp8_gemm: (codes, scale, w[0], w_scale[0], torch.float32, b),
        ops.fp8_gemm_add_: (torch.zeros(40, 128, device=x.device), codes, scale, w[0], w_scale[0], b),
        ops.grouped_fp8_gemm: (codes, scale, w, w_scale, offsets, torch.float32, b),
        ops.grouped_fp8_wgrad: (columns, column_scale, columns, column_scale, offsets, torch.float32, b),
    }.items():
        library.opcheck(operation.default, arguments, test_utils=("test_faketensor",))


def test_deep_gemm_gets_its_layouts(monkeypatch):
    """DeepGEMM is not installed here: a stand-in checks the layouts that its interface asks for."""
    from deepseek_v3.kernels import dispatch

    calls = []

    def fp8_gemm_nt(left, right, out):
        (a, a_scale), (b, b_scale) = left, right
        assert a_scale.stride() == (1, a.shape[0]) and b_scale.is_contiguous() and out.dtype == torch.bfloat16
        calls.append(a.shape)
        out.copy_((wide(a, a_scale) @ wide(b, b_scale).t()).to(out.dtype))

    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(fp8_gemm_nt=fp8_gemm_nt))
    monkeypatch.setattr(dispatch, "installed", lambda name: True)
    monkeypatch.setattr(dispatch, "cuda_reason", lambda device, least: None)
    monkeypatch.setattr(dispatch, "capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    a, a_scale = quantize_activation(rough(8, 256), backend="torch")
    b, b_scale = quantize_weight(rough(128, 256), backend="torch")
    got = fp8_gemm(a, a_scale, b, b_scale, backend="deep_gemm")
    assert calls == [(8, 256)]
    assert_close(got, wide(a, a_scale) @ wide(b, b_scale).t(), torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiples of 128"):
        fp8_gemm(a[:, :200], a_scale, b[:, :200], b_scale, backend="deep_gemm")


def test_cublas_is_not_given_scales_that_it_would_misread(monkeypatch):
    from deepseek_v3.kernels import dispatch

    monkeypatch.setattr(dispatch, "cuda_reason", lambda device, least: None)
    monkeypatch.setattr(dispatch, "capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    a, a_scale = quantize_activation(rough(8, 384), backend="torch")
    b, b_scale = quantize_weight(rough(256, 384), backend="torch")
    with pytest.raises(RuntimeError, match="multiples of 512"):
        fp8_gemm(a, a_scale, b, b_scale, backend="cublas")


@pytest.mark.gpu
@pytest.mark.parametrize("wgrad", [False, True])
def test_cublas_agrees(wgrad):
    a, a_scale = quantize_activation(rough(256, 512), backend="torch")
    b, b_scale = (quantize_activation if wgrad else quantize_weight)(rough(384, 512), backend="torch")
    inputs = [x.to("cuda") for x in (a, a_scale, b, b_scale)]
    for dtype in (torch.bfloat16, torch.float32):
        got = fp8_gemm(*inputs, out_dtype=dtype, backend="cublas")
        for row, exact in zip(got.split(16), (wide(a, a_scale) @ wide(b, b_scale).t()).split(16), strict=True):
            assert_close(row, exact, dtype)


def codes_of(*shape):
    return torch.zeros(shape).to(torch.float8_e4m3fn)


def ones(rows, *others):
    """Operands of ``rows`` rows against ``others``, a matrix or a stack of at most 128 rows, with 128 columns."""
    return codes_of(rows, 128), torch.ones(rows, 1), codes_of(*others, 128), torch.ones(*others[:-1], 1, 1)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fp8_gemm(codes_of(4, 128), torch.ones(4, 1), codes_of(4, 64), torch.ones(1, 1)), "N, K"),
        (lambda: fp8_gemm(codes_of(4, 128), torch.ones(4, 2), codes_of(4, 128), torch.ones(1, 1)), "needs a scale"),
        (lambda: fp8_gemm(torch.ones(4, 128), torch.ones(4, 1), codes_of(4, 128), torch.ones(1, 1)), "float8_e4m3fn"),
        (lambda: fp8_gemm(*ones(4, 4), out=torch.ones(4, 5)), "out must be"),
        (lambda: grouped_fp8_gemm(*ones(4, 2, 8), offsets_of([4])), "offsets"),
        (lambda: quantize_swiglu(torch.ones(2, 4), torch.ones(2, 5)), "differ"),
        (lambda: quantize_weight(torch.ones(2, 4), backend="cublas"), "no back end"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
