"""Queries, keys and values of expanded attention from the up-projections, in plain torch."""

import torch

from .norm import rotate


def rotate_queries(q, cos, sin, interleave):
    """See ``deepseek_v3.kernels.rotate_queries``."""
    nope = q.shape[3] - cos.shape[2]
    turned = rotate(q[..., nope:].transpose(1, 2), cos, sin, interleave).transpose(1, 2)
    return torch.cat((q[..., :nope], turned.to(q.dtype)), dim=-1)


def join_keys(kv, rope, nope):
    """See ``deepseek_v3.kernels.join_keys``."""
    shared = rope[:, :, None].expand(-1, -1, kv.shape[2], -1)
    return torch.cat((kv[..., :nope], shared), dim=-1), kv[..., nope:].contiguous()


def rotate_queries_backward(grad, cos, sin, interleave):
    """Gradient to the projection: the rotation is undone on the last R columns."""
    width = cos.shape[2]
    nope, half = grad.shape[3] - width, width // 2
    c, s = cos[:, :, None, :half], sin[:, :, None, :half]
    first, second = grad[..., nope : nope + half], grad[..., nope + half :]
    back = (first * c + second * s, second * c - first * s)
    turned = torch.stack(back, dim=-1).flatten(-2) if interleave else torch.cat(back, dim=-1)
    return torch.cat((grad[..., :nope], turned.to(grad.dtype)), dim=-1)


def join_keys_backward(grad_k, grad_v, nope):
    """Gradients to the projection, and to the rotated key that all heads share."""
    wide = torch.promote_types(grad_k.dtype, torch.float32)
    shared = grad_k[..., nope:].sum(dim=2, dtype=wide).to(grad_k.dtype)
    return torch.cat((grad_k[..., :nope], grad_v), dim=-1), shared
