"""RMSNorm of training against a float64 formula whose derivative autograd takes."""

import pytest
import torch
from torch import library

from deepseek_v3.kernels import joined_rms_norm


def truth(x, residual, weight, eps, grad, through):
    """Norm, sum and gradients to x (and the residual) and the weight, in float64."""
    total = (x if residual is None else x + residual).detach().cpu().double().requires_grad_()
    w = weight.detach().cpu().double().requires_grad_()
    out = w * total / (total.square().mean(-1, keepdim=True) + eps).sqrt()
    value = (out * grad.cpu().double()).sum()
    if through is not None:
        value = value + (total * through.cpu().double()).sum()
    return out.detach(), total.detach(), *torch.autograd.grad(value, (total, w))


def close(got, want, dtype):
    # Two roundings of a value and one of its weight's product.
    eps = max(4 * torch.finfo(dtype).eps, 1e-5)
    assert (got.detach().cpu().double() - want).abs().le(eps * want.abs() + eps * want.abs().max()).all()


# One row; rows that no program's share divides; a width between powers of two; a batch of sequences.
@pytest.mark.parametrize("shape", [(1, 128), (300, 72), (2, 5, 192)])
@pytest.mark.parametrize("joined", ["norm", "residual", "stream"])
def test_norm_sum_and_gradients(target, shape, joined):
    def random(*size):
        return torch.randn(size, device=target.device).to(target.dtype)

    x, weight = random(*shape).requires_grad_(), (random(shape[-1]) + 1).requires_grad_()
    residual = random(*shape).requires_grad_() if joined == "residual" else None
    grad, through = random(*shape), None if joined == "norm" else random(*shape)
    out, total = joined_rms_norm(x, residual, weight, 1e-5, backend=target.backend)
    want, want_total, want_dx, want_dw = truth(x, residual, weight, 1e-5, grad, through)
    leaves = [x, weight] + ([residual] if joined == "residual" else [])
    given = ((out,), (grad,)) if through is None else ((out, total), (grad, through))
    found = torch.autograd.grad(given[0], leaves, given[1])
    for got, expected in zip((out, total, *found), (want, want_total, want_dx, want_dw, want_dx), strict=False):
        close(got, expected, target.dtype)
        assert got.dtype == target.dtype


def test_a_wider_weight_or_stream_widens_the_result(target):
    x = torch.randn(7, 128, device=target.device).to(target.dtype).requires_grad_()
    stream = torch.randn(7, 128, device=target.device).requires_grad_()
    weight = torch.ones(128, device=target.device, requires_grad=True)
    out, total = joined_rms_norm(x, stream, weight, backend=target.backend)
    assert out.dtype == total.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == target.dtype and stream.grad.dtype == torch.float32
    assert torch.equal(x.grad, stream.grad.to(target.dtype))


def test_rows_of_a_wider_matrix_are_read_in_place(target):
    wide = torch.randn(9, 192, device=target.device).to(target.dtype)
    weight = torch.randn(128, device=target.device).to(target.dtype)
    found = []
    for x in (wide[:, :128], wide[:, :128].contiguous()):
        x = x.detach().requires_grad_()
        out, _ = joined_rms_norm(x, None, weight, backend=target.backend)
        found.append((out, *torch.autograd.grad(out.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_either_gradient_may_be_missing():
    x, weight = torch.randn(3, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    _, total = joined_rms_norm(x, None, weight)
    (dx,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(dx, torch.ones_like(dx))


def test_operations_are_one_node_each():
    ops = torch.ops.deepseek_v3
    x, weight = torch.randn(4, 64), torch.randn(64)
    library.opcheck(ops.rms_norm_kept.default, (x, x.clone(), weight, 1e-6, "auto"))
    library.opcheck(ops.rms_norm_kept.default, (x, None, weight, 1e-6, "auto"))
    library.opcheck(ops.rms_norm_backward.default, (x, x.clone(), weight, torch.rand(4), None, "auto"))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs a weight"):
        joined_rms_norm(torch.ones(2, 64), None, torch.ones(32))
    with pytest.raises(ValueError, match="residual of its shape"):
        joined_rms_norm(torch.ones(2, 64), torch.ones(1, 64), torch.ones(64))
