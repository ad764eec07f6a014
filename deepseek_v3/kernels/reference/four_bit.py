"""Four-bit codes under the maxima of blocks of 64 numbers, widened in plain torch.

E matrices, n numbers in each, B = ceil(n / 64) blocks.
"""

import torch
import torch.nn.functional as F

BLOCK = 64
# Maxima under one factor, where they are codes themselves.
NESTED_BLOCK = 256


def widen_4bit(codes, absmax, table, numbers, nested_absmax, offset, nested_table, chosen, dtype):
    """See ``deepseek_v3.kernels.widen_4bit``."""
    if chosen is not None:
        codes, absmax = codes.index_select(0, chosen), absmax.index_select(0, chosen)
    if nested_absmax is not None:
        if chosen is not None:
            nested_absmax, offset = nested_absmax.index_select(0, chosen), offset.index_select(0, chosen)
        scale = nested_absmax.repeat_interleave(NESTED_BLOCK, dim=1)[:, : absmax.shape[1]]
        absmax = nested_table[absmax.int()] * scale + offset[:, None]
    # Both numbers of each of the 256 bytes at once.
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)
    wide = F.embedding(codes.int(), pairs).flatten(1)
    wide = F.pad(wide, (0, absmax.shape[1] * BLOCK - wide.shape[1])).unflatten(1, (-1, BLOCK))
    return (wide * absmax[..., None]).flatten(1)[:, :numbers].to(dtype).contiguous()
