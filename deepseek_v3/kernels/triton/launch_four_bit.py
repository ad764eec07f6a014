"""Launcher of the kernel that widens 4-bit codes."""

import torch
import triton

from .four_bit import widen_blocks

BLOCKS = 64


def widen_4bit(codes, absmax, table, numbers, nested_absmax, offset, nested_table, chosen, dtype):
    """See ``deepseek_v3.kernels.widen_4bit``; everything contiguous."""
    matrices = len(codes) if chosen is None else len(chosen)
    out = torch.empty(matrices, numbers, dtype=dtype, device=codes.device)
    blocks = absmax.shape[1]
    if out.numel():
        # Without fused multiply-adds a nested maximum is rounded as bitsandbytes rounds it.
        widen_blocks[(triton.cdiv(blocks, BLOCKS), matrices)](
            codes, absmax, nested_absmax, offset, table, nested_table, chosen, out,
            numbers, codes.shape[1], blocks, 0 if nested_absmax is None else nested_absmax.shape[1],
            CHOSEN=chosen is not None, NESTED=nested_absmax is not None, BLOCKS=BLOCKS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
