"""The joined steps of a decode layer in plain torch."""

import torch

from .norm import rms_norm, rotate, write_latents


def rope_angles(positions, frequencies, factor, dtype):
    """See ``deepseek_v3.kernels.rope_angles``."""
    angle = positions[..., None].float() * frequencies.float()
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def norm_and_write(
    low, low_weight, low_eps, latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale
):
    """See ``deepseek_v3.kernels.norm_and_write``."""
    write_latents(latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale)
    return rms_norm(low, low_weight, low_eps, None)[0]


def absorb_queries(q, weight, cos, sin, interleave):
    """See ``deepseek_v3.kernels.absorb_queries``."""
    nope = q.shape[3] - cos.shape[2]
    of_keys = weight.view(q.shape[2], -1, weight.shape[1])[:, :nope]  # [H, N, C]
    turned = rotate(q[..., nope:].transpose(1, 2), cos, sin, interleave).transpose(1, 2)
    return torch.einsum("bthn,hnc->bthc", q[..., :nope], of_keys), turned


def absorb_outputs(mixed, weight, value):
    """See ``deepseek_v3.kernels.absorb_outputs``."""
    of_values = weight.view(mixed.shape[2], -1, weight.shape[1])[:, -value:]  # [H, V, C]
    return torch.einsum("bthc,hvc->bthv", mixed, of_values)
