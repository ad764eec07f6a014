"""SwiGLU's product and its gradient against float64."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.kernels import swiglu


def check(ours, truth, dtype):
    """Half a step of the dtype, and what float32 adds."""
    assert ours.dtype == dtype and ours.shape == truth.shape
    step = torch.finfo(dtype).eps / 2 + 2e-6
    assert ((ours.cpu().double() - truth).abs() <= step * truth.abs() + 2e-6).all()


@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (5, 24), (3, 1023), (2, 5, 300), (130, 1500), (1, 2100)])
@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("wide", [False, True])
def test_it_is_rounded_once_and_so_is_its_gradient(target, shape, halves, wide):
    dtype = torch.float32 if wide else target.dtype
    both, grad = 3 * torch.randn(*shape[:-1], 2 * shape[-1]), 3 * torch.randn(shape)
    both, grad = both.to(dtype), grad.to(dtype)
    exact = both.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    expected.backward(grad.double())
    there = both.to(target.device, copy=True)
    given = [there] if halves else [half.contiguous() for half in there.chunk(2, dim=-1)]
    given = [x.requires_grad_() for x in given]
    result = swiglu(*given, backend=target.backend)
    result.backward(grad.to(target.device))
    assert result.is_contiguous()
    check(result.detach(), expected.detach(), dtype)
    check(torch.cat([x.grad for x in given], dim=-1), exact.grad, dtype)


def test_strided_halves(target):
    both = torch.randn(7, 80).to(target.dtype).to(target.device)
    wanted = swiglu(both, backend=target.backend)
    assert torch.equal(swiglu(*both.chunk(2, dim=-1), backend=target.backend), wanted)
    turned = both.t().contiguous().t()
    torch.testing.assert_close(swiglu(*turned.chunk(2, dim=-1), backend=target.backend), wanted)


def test_a_row_that_is_no_number_spoils_no_other(target):
    both = torch.randn(4, 40).to(target.dtype).to(target.device)
    clean = swiglu(both, backend=target.backend)
    both[2] = float("nan")
    spoilt = swiglu(both, backend=target.backend)
    assert spoilt[2].isnan().all() and torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([torch.ones(3, 5)], "even width"),
        ([torch.ones(3, 4), torch.ones(3, 5)], "one shape"),
        ([torch.ones(3, 4), torch.ones(3, 4).half()], "one shape and dtype"),
    ],
)
def test_mistakes_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        swiglu(*given)
