"""Layout of queries, keys and values against float64 formulas with complex rotations, and its gradients."""

import pytest
import torch
from test_kernels_norm import angles, close, rotate_truth
from torch import library

from deepseek_v3.kernels import join_keys, rotate_queries, rotate_queries_

SHAPES = [(1, 1, 1, 128, 64, 128), (2, 3, 5, 6, 4, 10), (1, 5, 33, 16, 2, 16), (2, 2, 16, 0, 8, 3)]


def strided(*shape, dtype):
    """A view with dense rows and room between them."""
    return torch.randn(*shape[:-1], shape[-1] + 8).to(dtype)[..., : shape[-1]]


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("batch, tokens, heads, nope, width, value", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_rotated_queries_and_their_gradient(target, batch, tokens, heads, nope, width, value, shared, interleave):
    q = strided(batch, tokens, heads, nope + width, dtype=target.dtype)
    cos, sin = angles(1 if shared else batch, tokens, width, target.dtype)
    given = [t.to(target.device) for t in (q, cos, sin)]
    given[0].requires_grad_()
    got = rotate_queries(*given, interleave=interleave, backend=target.backend)

    def truth(q):
        turned = rotate_truth(q[..., nope:].transpose(1, 2), cos, sin, interleave).transpose(1, 2)
        return torch.cat((q[..., :nope], turned), -1)

    exact = q.detach().double().requires_grad_()
    expected = truth(exact)
    close(got.detach(), expected.detach(), target.dtype)
    assert torch.equal(got[..., :nope].cpu(), q[..., :nope])
    grad = strided(heads, batch, tokens, nope + width, dtype=target.dtype).permute(1, 2, 0, 3)
    expected.backward(grad.double())
    got.backward(grad.to(target.device))
    close(given[0].grad, exact.grad, target.dtype)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("batch, tokens, heads, nope, width, value", SHAPES)
def test_rotated_in_place(target, batch, tokens, heads, nope, width, value, interleave):
    q = strided(batch, tokens, heads, nope + width, dtype=target.dtype).to(target.device)
    cos, sin = (x.to(target.device) for x in angles(1, tokens, width, target.dtype))
    wanted = rotate_queries(q, cos, sin, interleave=interleave, backend=target.backend)
    assert rotate_queries_(q, cos, sin, interleave=interleave, backend=target.backend) is q
    assert torch.equal(q, wanted)


@pytest.mark.parametrize("batch, tokens, heads, nope, width, value", SHAPES)
def test_joined_keys_and_their_gradients(target, batch, tokens, heads, nope, width, value):
    kv = strided(batch, tokens, heads, nope + value, dtype=target.dtype).to(target.device).requires_grad_()
    rope = strided(batch, tokens, width, dtype=target.dtype).to(target.device).requires_grad_()
    k, v = join_keys(kv, rope, nope, backend=target.backend)
    assert k.is_contiguous() and v.is_contiguous()
    assert torch.equal(k[..., :nope], kv[..., :nope]) and torch.equal(v, kv[..., nope:])
    assert torch.equal(k[..., nope:], rope[:, :, None].expand(-1, -1, heads, -1))
    # As a fused attention hands them back: heads before tokens.
    grad_k = strided(batch, heads, tokens, nope + width, dtype=target.dtype).transpose(1, 2)
    grad_v = strided(batch, heads, tokens, value, dtype=target.dtype).transpose(1, 2)
    torch.autograd.backward((k, v), (grad_k.to(target.device), grad_v.to(target.device)))
    assert torch.equal(kv.grad.cpu(), torch.cat((grad_k[..., :nope], grad_v), -1))
    truth = grad_k[..., nope:].double().sum(2)
    bound = grad_k[..., nope:].double().abs().sum(2) * torch.finfo(target.dtype).eps
    assert ((rope.grad.cpu().double() - truth).abs() <= bound + 1e-7).all()


def test_gradients_against_finite_differences():
    q, kv, rope = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2, 7), (2, 3, 2, 5), (2, 3, 4))
    )
    cos, sin = angles(2, 3, 4, torch.float64)
    for interleave in (True, False):
        assert torch.autograd.gradcheck(lambda q, i=interleave: rotate_queries(q, cos, sin, interleave=i), (q,))
    assert torch.autograd.gradcheck(lambda kv, rope: join_keys(kv, rope, 3), (kv, rope))


def test_operations_have_fakes(target):
    q, rope = torch.randn(2, 3, 4, 12), torch.randn(2, 3, 4)
    cos, sin = angles(2, 3, 4, target.dtype)
    q, rope, cos, sin = (t.to(target.dtype).to(target.device) for t in (q, rope, cos, sin))
    ops, b = torch.ops.deepseek_v3, target.backend
    for operation, arguments in {
        ops.rotate_queries: (q, cos, sin, True, False, b),
        ops.rotate_queries_: (q.detach().clone(), cos, sin, True, b),
        ops.join_keys: (q, rope, 8, b),
        ops.join_keys_backward: (q, q[..., :5], 8, b),
    }.items():
        library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rotate_queries(torch.ones(1, 2, 3, 4), torch.ones(1, 3, 2), torch.ones(1, 3, 2)), "cos, sin"),
        (lambda: rotate_queries(torch.ones(2, 3, 4), torch.ones(1, 3, 2), torch.ones(1, 3, 2)), "N \\+ R"),
        (lambda: join_keys(torch.ones(1, 2, 3, 4), torch.ones(1, 3, 2), 2), "rope"),
        (lambda: join_keys(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 2), 5), "N = 5"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
