"""SwiGLU's gate and its gradient against float64."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.kernels import silu_gate


@pytest.mark.parametrize("rows, width", [(1, 1), (0, 8), (5, 24), (3, 1023), (130, 1500)])
@pytest.mark.parametrize("wide", [False, True])
def test_it_is_rounded_once_and_so_is_its_gradient(target, rows, width, wide):
    dtype = torch.float32 if wide else target.dtype
    both, grad = (3 * torch.randn(rows, size) for size in (2 * width, width))
    both, grad = both.to(dtype), grad.to(dtype)
    there = both.to(target.device, copy=True).requires_grad_()
    result = silu_gate(there, backend=target.backend)
    result.backward(grad.to(target.device))
    exact = both.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    expected.backward(grad.double())
    assert result.dtype == there.grad.dtype == dtype
    # Half a step of the dtype, and what float32 adds.
    step = torch.finfo(dtype).eps / 2 + 2e-6
    for ours, truth in ((result.detach(), expected.detach()), (there.grad, exact.grad)):
        assert ours.shape == truth.shape
        assert ((ours.cpu().double() - truth).abs() <= step * truth.abs() + 2e-6).all()


def test_a_row_that_is_no_number_spoils_no_other(target):
    both = torch.randn(4, 40).to(target.dtype).to(target.device)
    clean = silu_gate(both, backend=target.backend)
    both[2] = float("nan")
    spoilt = silu_gate(both, backend=target.backend)
    assert spoilt[2].isnan().all() and torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4)])
def test_mistakes_are_named(shape):
    with pytest.raises(ValueError, match="side by side"):
        silu_gate(torch.randn(shape))
