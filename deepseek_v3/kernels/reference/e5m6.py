"""Twelve-bit numbers, E5M6 under power-of-two scales of 1 x 128 tiles, in plain torch.

A code is a sign, 5 exponent bits with bias 15 and 6 mantissa bits; every exponent field stands for numbers (there is
no code for infinity or NaN: a tile that holds one has a NaN scale), field 0 for subnormals. Its high 8 bits lie in
one plane, its low 4 bits in another, those of columns j and j + 64 of a tile in one byte.
"""

import torch
import torch.nn.functional as F

E5M6_MAX = 2.0**16 * (1 + 63 / 64)
# Exponent bias of float32 minus that of E5M6, in units of its mantissa.
BIAS = (127 - 15) << 6


def e5m6_scale(amax):
    """Powers of two under which amax is at most the largest code, NaN where amax is not finite."""
    mantissa, exponent = torch.frexp(amax.clamp(min=E5M6_MAX * 2.0**-100) / E5M6_MAX)
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    return torch.where(amax.isfinite(), scale, torch.nan)


def pack_e5m6(x):
    """See ``deepseek_v3.kernels.pack_e5m6``."""
    tiles = F.pad(x.float(), (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))  # [M, G, 128]
    scale = e5m6_scale(tiles.abs().amax(-1))
    small = tiles.abs() / scale[..., None]
    bits = small.view(torch.int32)
    # Round to nearest, ties to even: add half a unit less one, and one if the kept last bit is odd.
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) >> 17) - BIAS
    code = torch.where(small < 2.0**-14, torch.round(small * 2.0**20).nan_to_num(0).int(), normal)
    code = (code.clamp(0, 0x7FF) | (tiles < 0).int() << 11).view(*tiles.shape[:2], 128)
    high = (code >> 4).to(torch.uint8).flatten(1)
    low = code & 15
    return high, (low[..., :64] | low[..., 64:] << 4).to(torch.uint8).flatten(1), scale


def unpack_e5m6(high, low, scale, width, dtype):
    """See ``deepseek_v3.kernels.unpack_e5m6``."""
    pairs = low.int().unflatten(1, (-1, 64))
    code = high.int().unflatten(1, (-1, 128)) << 4 | torch.cat((pairs & 15, pairs >> 4), dim=-1)
    magnitude = code & 0x7FF
    normal = ((magnitude + BIAS) << 17).view(torch.float32)
    value = torch.where(magnitude < 64, magnitude.float() * 2.0**-20, normal) * scale[..., None]
    return torch.where(code >> 11 == 1, -value, value).flatten(1)[:, :width].to(dtype).contiguous()
