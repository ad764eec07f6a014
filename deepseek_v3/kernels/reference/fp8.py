"""Products of FP8 codes with fine-grained scales in plain torch: codes widened, scaled and multiplied in float32.

M rows, N columns, K reduced, P rows sorted by expert, E experts. One scale stands for 128 reduced elements of a row
(1 x 128) or for 128 rows of them (128 x 128); a ragged end is a short group.
"""

import torch

from .quantize import quantize_activation

GROUP = 128


def widen(codes, scale):
    """Float32 values of codes [..., R, K] under scales [..., R or ceil(R / 128), ceil(K / 128)]."""
    rows, depth = codes.shape[-2:]
    scale = scale.float()
    if scale.shape[-2] != rows:
        scale = scale.repeat_interleave(GROUP, -2)[..., :rows, :]
    return codes.float() * scale.repeat_interleave(GROUP, -1)[..., :depth]


def by_group(scale):
    """The same scales stored by group, as the products read them."""
    return scale.t().contiguous().t()


def fp8_gemm(a, a_scale, b, b_scale, out_dtype):
    """See ``deepseek_v3.kernels.fp8_gemm``."""
    return (widen(a, a_scale) @ widen(b, b_scale).t()).to(out_dtype)


def _bounds(offsets):
    bounds = offsets.tolist()
    return list(zip(bounds, bounds[1:], strict=False))


def grouped_fp8_gemm(x, x_scale, w, w_scale, offsets, out_dtype):
    """See ``deepseek_v3.kernels.grouped_fp8_gemm``; rows of no expert are zeros here."""
    out = torch.zeros(x.shape[0], w.shape[1], dtype=out_dtype, device=x.device)
    for e, (start, end) in enumerate(_bounds(offsets)):
        if end > start:
            out[start:end] = fp8_gemm(x[start:end], x_scale[start:end], w[e], w_scale[e], out_dtype)
    return out


def padded_groups(rows, experts):
    """Groups of 128 rows that any spread of ``rows`` over ``experts`` fits in."""
    return rows // GROUP + experts


def quantize_grouped_transposed(x, offsets, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.quantize_grouped_transposed``."""
    rows, width = x.shape
    groups = padded_groups(rows, offsets.numel() - 1)
    codes = torch.zeros(width, groups * GROUP, device=x.device).to(torch.float8_e4m3fn)
    scale = torch.ones(groups, width, device=x.device).t()
    group = 0
    for start, end in _bounds(offsets):
        count = -(-(end - start) // GROUP)
        if count:
            part, part_scale = quantize_activation(x[start:end].t(), GROUP, scale_fmt, amax_floor)
            codes[:, group * GROUP : group * GROUP + end - start] = part
            scale[:, group : group + count] = part_scale
            group += count
    return codes, scale


def grouped_fp8_wgrad(dy, dy_scale, x, x_scale, offsets, dtype):
    """See ``deepseek_v3.kernels.grouped_fp8_wgrad``."""
    out = torch.zeros(offsets.numel() - 1, dy.shape[0], x.shape[0], dtype=dtype, device=x.device)
    group = 0
    for e, (start, end) in enumerate(_bounds(offsets)):
        count = -(-(end - start) // GROUP)
        here, scales = slice(group * GROUP, (group + count) * GROUP), slice(group, group + count)
        if count:
            out[e] = fp8_gemm(dy[:, here], dy_scale[:, scales], x[:, here], x_scale[:, scales], dtype)
        group += count
    return out
