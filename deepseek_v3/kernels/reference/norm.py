"""RMSNorm, rotary embedding and the write of new latents into the cache, in plain torch."""

import torch

from .mla import SCALE_GROUP
from .quantize import AMAX_FLOOR, quantize_activation


def rms_norm(x, weight, eps, residual):
    """See ``deepseek_v3.kernels.rms_norm``."""
    if residual is not None:
        x = x + residual
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = x.to(wide)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return weight * value.to(x.dtype), x


def rotate(x, cos, sin, interleave):
    """See ``deepseek_v3.kernels.rotate``."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., :half], x[..., half:])
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def write_latents(latent, rope, compressed, weight, eps, cos, sin, slots, interleave, scale):
    """See ``deepseek_v3.kernels.write_latents``."""
    rank = latent.shape[2]
    row = torch.arange(latent.shape[0], device=latent.device)[:, None]
    value = rms_norm(compressed[..., :rank], weight, eps, None)[0]
    if scale is None:
        latent[row, slots] = value.to(latent.dtype)
    else:
        codes, scale[row, slots] = quantize_activation(value, SCALE_GROUP, None, AMAX_FLOOR)
        latent.view(torch.uint8)[row, slots] = codes.view(torch.uint8)
    rope[row, slots] = rotate(compressed[:, None, :, rank:], cos, sin, interleave)[:, 0].to(rope.dtype)
