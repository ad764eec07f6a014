"""Re-tiling of kept codes and SwiGLU's backward, against formulas written here in float64."""

import pytest
import torch

from deepseek_v3.kernels import (
    pack_e5m6,
    quantize_activation,
    quantize_both,
    quantize_swiglu,
    retile,
    sort_pairs,
    swiglu_backward,
    swiglu_backward_codes,
    swiglu_forward_codes,
    unpack_e5m6,
)


def tiles_of_rows(values, scale_fmt):
    """[P, D] to codes and scales [D, .] of 128 x 1 tiles, element by element as the report says."""
    values = torch.nn.functional.pad(values.double(), (0, 0, 0, -len(values) % 128)).t().unflatten(1, (-1, 128))
    scale = (values.abs().amax(-1).float() / 448).clamp(min=2.0**-126)
    if scale_fmt:
        scale = 2.0 ** torch.ceil(torch.log2(scale.double())).float()
    codes = (values.float() / scale[..., None]).to(torch.float8_e4m3fn)
    return codes.flatten(1), scale


def kept(target, rows, width, scale_fmt=None):
    x = torch.randn(rows, width, device=target.device).to(target.dtype)
    x[:, 3] *= 200
    codes, scale = quantize_activation(x, scale_fmt=scale_fmt, backend=target.backend)
    wide = codes.float() * scale.repeat_interleave(128, 1)[:, :width]
    return x, codes, scale, wide


# Whole tiles; a short last tile; fewer rows than a tile and columns that no piece divides.
@pytest.mark.parametrize("shape", [(256, 128), (200, 256), (33, 72)])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_kept_codes_are_retiled_along_the_rows(target, shape, scale_fmt):
    _, codes, scale, wide = kept(target, *shape, scale_fmt)
    expected, expected_scale = tiles_of_rows(wide.cpu(), scale_fmt)
    out, out_scale = retile(codes, scale, scale_fmt=scale_fmt, backend=target.backend)
    assert torch.equal(out_scale.cpu(), expected_scale)
    assert torch.equal(out.cpu().float(), expected.float()[:, : shape[0]])


# Whole tiles; short ones at both edges; rows whose codes are not whole words.
@pytest.mark.parametrize("shape", [(128, 256), (200, 192), (33, 72)])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_one_read_gives_the_tiles_along_rows_and_columns(target, shape, scale_fmt):
    x = torch.randn(shape, device=target.device).to(target.dtype)
    x[:, 3] *= 200
    x[5] = 0
    codes, scale, down, scale_down = quantize_both(x, scale_fmt=scale_fmt, backend=target.backend)
    along, scale_along = tiles_of_rows(x.cpu().float().t(), scale_fmt)
    expected, expected_down = tiles_of_rows(x.cpu().float(), scale_fmt)
    assert torch.equal(scale.cpu(), scale_along) and torch.equal(scale_down.cpu(), expected_down)
    assert torch.equal(codes.cpu().float(), along.float()[:, : shape[1]])
    assert torch.equal(down.cpu().float(), expected.float()[:, : shape[0]])


def test_broken_tiles_say_so_along_rows_and_columns(target):
    x = torch.randn(256, 256, device=target.device).to(target.dtype)
    x[0, 3], x[200, 200] = float("nan"), float("inf")
    codes, scale, down, scale_down = quantize_both(x, backend=target.backend)
    assert scale[0, 0].isnan() and scale[200, 1].isinf() and scale_down[3, 0].isnan() and scale_down[200, 1].isinf()
    assert codes[0, :128].float().isnan().all() and codes[200, 200].float().isnan()
    assert down[3, :128].float().isnan().all() and down[200, 200].float().isnan()
    assert codes.float().isnan().sum() == down.float().isnan().sum() == 128 + 1


# Some experts have no rows, one has more than a tile; the last pairs belong to nobody.
@pytest.mark.parametrize("scaled", [True, False])
def test_rows_are_gathered_and_each_experts_rows_start_a_tile(target, scaled):
    x, codes, scale, wide = kept(target, 90, 128)
    index = torch.randint(0, 6, (90, 3), device=target.device)
    index[index == 2] = 1
    order, _, offsets = sort_pairs(index, 5, backend=target.backend)
    rows = order // 3
    given = (codes, scale) if scaled else (x, None)
    out, out_scale = retile(*given, rows=rows, offsets=offsets, backend=target.backend)
    values = (wide if scaled else x.float())[rows.long()].cpu()
    group = 0
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        expected, expected_scale = tiles_of_rows(values[start:stop], None)
        count = expected_scale.shape[1]
        assert torch.equal(out_scale[:, group : group + count].cpu(), expected_scale)
        assert torch.equal(out[:, group * 128 : (group + count) * 128].cpu().float(), expected.float())
        group += count


# One row, rows that no block divides, several pieces of columns.
@pytest.mark.parametrize("shape", [(1, 128), (37, 128), (20, 384)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_backward_is_the_derivative(target, shape, scaled, weighted):
    rows, width = shape
    x, codes, scale, wide = kept(target, rows, 2 * width)
    x[:, 3] /= 200
    gate_up = (wide if scaled else x).cpu().double().requires_grad_()
    grad = torch.randn(rows, width, device=target.device).to(target.dtype)
    weights = torch.rand(rows, device=target.device) if weighted else None
    w = weights.cpu().double().requires_grad_() if weighted else torch.ones(rows, dtype=torch.double).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    product = gate * torch.sigmoid(gate) * up * w[:, None]
    expected, share = torch.autograd.grad((product * grad.cpu().double()).sum(), (gate_up, w))
    given = (codes, scale) if scaled else (x, None)
    results = swiglu_backward(*given, grad, weights, backend=target.backend)
    eps = torch.finfo(target.dtype).eps
    for got, want in zip(results, (expected, product.detach(), share), strict=True):
        bound = (eps if got.dtype == target.dtype else 1e-5) * want.abs() + 1e-5 * want.abs().max()
        assert (got.cpu().double() - want).abs().le(bound + 1e-6).all()


# One row, rows that no block divides, several pieces of columns; a width that 128 does not divide.
@pytest.mark.parametrize("shape", [(1, 128), (37, 256), (5, 72)])
def test_swiglu_and_its_inputs_of_one_read(target, shape):
    rows, width = shape
    backend, parts = ("auto", "torch") if width % 128 else (target.backend, target.backend)
    gate_up = torch.randn(rows, 2 * width, device=target.device).to(target.dtype)
    product, kept_codes = swiglu_forward_codes(gate_up, backend=backend)
    gate, up = gate_up.chunk(2, dim=-1)
    wanted = (*quantize_swiglu(gate, up, backend=parts), *quantize_activation(gate_up, backend=parts))
    for got, want in zip(product + kept_codes, wanted, strict=True):
        assert torch.equal(got.float(), want.float())


def assert_seldom_differs(got, want):
    """Compiled for a GPU, two kernels may contract a product and a sum differently: one step of a code, seldom."""
    if got.device.type == "cpu":
        assert torch.equal(got.float(), want.float())
    got, want = got.cpu().float(), want.cpu().float()
    assert ((got - want).abs() > 1e-6 * want.abs()).float().mean() < 2e-3
    assert (got - want).norm() <= 2e-3 * want.norm()


# Whole and short tiles, several pieces of columns; values and codes; with and without weights.
@pytest.mark.parametrize("shape", [(128, 128), (77, 256), (200, 128)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_backward_gives_the_codes_of_its_numbers(target, shape, scaled, weighted):
    """Of the numbers before they are rounded to the gradient's dtype; the weights' sums are in another order."""
    rows, width = shape
    x, codes, scale, _ = kept(target, rows, 2 * width)
    grad = torch.randn(rows, width, device=target.device).to(target.dtype)
    weights = torch.rand(rows, device=target.device) if weighted else None
    given = (codes, scale) if scaled else (x / 200, None)
    numbers, product, share = swiglu_backward(*given, grad.float(), weights, backend=target.backend)
    along, down, turned, sums = swiglu_backward_codes(*given, grad, weights, backend=target.backend)
    expected = quantize_both(numbers, backend=target.backend)
    for got, want in zip((*along, *down, *turned), (*expected, *retile(product)), strict=True):
        assert_seldom_differs(got, want)
    if weighted:
        assert torch.allclose(sums, share, rtol=1e-4, atol=1e-4 * share.abs().max().item())


def test_swiglu_codes_start_each_experts_rows_in_a_tile(target):
    x, codes, scale, _ = kept(target, 90, 256)
    grad = torch.randn(90, 128, device=target.device).to(target.dtype)
    weights = torch.rand(90, device=target.device)
    offsets = torch.tensor([0, 10, 10, 55, 84], dtype=torch.int32, device=target.device)
    numbers, product, share = swiglu_backward(codes, scale, grad.float(), weights, backend=target.backend)
    along, down, turned, sums = swiglu_backward_codes(
        codes, scale, grad, weights, offsets=offsets, backend=target.backend
    )
    groups = 3  # of 10, 45 and 29 rows
    for got, values in ((down, numbers), (turned, product)):
        want = retile(values, offsets=offsets, backend=target.backend)
        assert_seldom_differs(got[1][:, :groups], want[1][:, :groups])
        assert_seldom_differs(got[0][:, : groups * 128], want[0][:, : groups * 128])
    for got, want in zip(along, quantize_activation(numbers, backend=target.backend), strict=True):
        assert_seldom_differs(got[:84], want[:84])
    assert torch.allclose(sums[:84], share[:84], rtol=1e-4, atol=1e-4 * share.abs().max().item())


def test_rows_of_nobody_do_not_spread(target):
    """Rows behind the last expert hold whatever was in memory."""
    x, _, _, _ = kept(target, 40, 128)
    index = torch.arange(40, device=target.device)[:, None] % 3
    order, _, offsets = sort_pairs(index, 2, backend=target.backend)
    x[order[offsets[-1].item() :].long()] = float("nan")
    codes, scale = retile(x, rows=order, offsets=offsets, backend=target.backend)
    assert scale.isfinite().all() and codes.float().isfinite().all()


def every_e5m6():
    """All magnitudes of 5 exponent and 6 mantissa bits, bias 15, every field a number, by their code."""
    subnormal = [mantissa / 64 * 2.0**-14 for mantissa in range(64)]
    return torch.tensor(subnormal + [2.0 ** (e - 15) * (1 + m / 64) for e in range(1, 32) for m in range(64)]).double()


# Whole tiles; a short last tile in either half.
@pytest.mark.parametrize("shape", [(19, 256), (5, 200), (3, 40)])
def test_e5m6_rounds_to_the_nearest_code_of_all(target, shape):
    x = torch.randn(shape, device=target.device) * 10.0 ** torch.randint(-4, 3, shape, device=target.device)
    x = x.to(target.dtype)
    x[0, :3] = torch.tensor([0.0, -0.0, 1.0])
    high, low, scale = pack_e5m6(x, backend=target.backend)
    assert high.numel() + low.numel() == shape[0] * -(-shape[1] // 128) * 192
    got = unpack_e5m6(high, low, scale, shape[1], dtype=torch.float32, backend=target.backend)
    assert got.is_contiguous()  # attention views it in its own shape
    got = got.cpu().double()
    amax = torch.nn.functional.pad(x.cpu().double().abs(), (0, -shape[1] % 128)).unflatten(1, (-1, 128)).amax(-1)
    codes = every_e5m6()
    power = 2.0 ** torch.ceil(torch.log2(amax / codes.max()))
    assert torch.equal(scale.cpu().double(), power)
    small = x.cpu().double().abs() / power.repeat_interleave(128, 1)[:, : shape[1]]
    above = torch.searchsorted(codes, small).clamp(1, len(codes) - 1)
    lower, upper = codes[above - 1], codes[above]
    even = torch.where((above - 1) % 2 == 0, lower, upper)
    nearest = torch.where(
        small - lower < upper - small, lower, torch.where(small - lower > upper - small, upper, even)
    )
    want = torch.copysign(nearest * power.repeat_interleave(128, 1)[:, : shape[1]], x.cpu().double())
    assert torch.equal(got, want)


def test_e5m6_of_what_it_wrote_is_exact_and_broken_tiles_say_so(target):
    x = torch.randn(16, 256, device=target.device).to(target.dtype)
    once = unpack_e5m6(*pack_e5m6(x, backend=target.backend), 256, dtype=torch.float32, backend=target.backend)
    twice = unpack_e5m6(*pack_e5m6(once, backend=target.backend), 256, dtype=torch.float32, backend=target.backend)
    assert torch.equal(once, twice)
    x[0, 3], x[1, 200], x[2] = float("nan"), float("-inf"), 0
    out = unpack_e5m6(*pack_e5m6(x, backend=target.backend), 256, dtype=target.dtype, backend=target.backend)
    assert out[0, :128].isnan().all() and out[1, 128:].isnan().all() and not out[2].any()
    assert out[0, 128:].isfinite().all() and out[1, :128].isfinite().all() and out[3:].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_e5m6(torch.ones(4)), "floating matrix"),
        (lambda: unpack_e5m6(*pack_e5m6(torch.ones(4, 128)), 129), "do not fit"),
        (lambda: retile(torch.ones(2, 3, 4)), "x must be"),
        (lambda: quantize_both(torch.ones(4)), "x must be"),
        (lambda: swiglu_forward_codes(torch.ones(4, 3)), "gate_up must be"),
        (lambda: retile(torch.ones(4, 128), torch.ones(4, 1)), "x must be"),
        (lambda: retile(torch.ones(4, 128).to(torch.float8_e4m3fn), torch.ones(4, 2)), "does not fit codes"),
        (lambda: retile(torch.ones(4, 128), rows=torch.arange(4)), "rows must be"),
        (lambda: retile(torch.ones(4, 128), scale_fmt="e5"), "scale_fmt"),
        (lambda: swiglu_backward(torch.ones(4, 100), None, torch.ones(4, 60)), "twice as wide"),
        (lambda: swiglu_backward(torch.ones(4, 128), torch.ones(4, 1), torch.ones(4, 64)), "need a scale"),
        (lambda: swiglu_backward(torch.ones(4, 128), None, torch.ones(4, 64), torch.ones(3)), "weights"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
