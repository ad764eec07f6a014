"""FP8 E4M3 quantisation in plain torch: the truth that the kernels are held to, and the path of the CPU.

What is special: matrices are worked on in slabs of whole blocks, so the float32 copy that the arithmetic
needs stays a few MiB however large the expert stack is; a ragged edge is a block that happens to be small.

Scales follow the DeepSeek-V3 report, section 3.3: ``s = amax / 448`` and ``code = cast(x / s)``. With
``scale_fmt="ue8m0"`` the scale is rounded up to a power of two, ``2 ** ceil(log2(amax / 448))``.
"""

import math

import torch
import torch.nn.functional as F

FP8_MAX = 448.0
# The least amax whose scale is a normal float32: a smaller scale is lost where subnormals are flushed to zero,
# and an all-zero block needs some finite positive scale.
AMAX_FLOOR = FP8_MAX * 2.0**-126
SCALE_FORMATS = (None, "ue8m0")
SLAB_ELEMENTS = 1 << 22


def check_scale_format(scale_fmt: str | None) -> None:
    """Raise ValueError for a scale format that nobody here writes."""
    if scale_fmt not in SCALE_FORMATS:
        raise ValueError(f"scale_fmt must be None (float32 scales) or 'ue8m0' (powers of two), got {scale_fmt!r}")


def scale_from_amax(amax: torch.Tensor, scale_fmt: str | None, amax_floor: float = AMAX_FLOOR) -> torch.Tensor:
    """Float32 scales of the blocks whose largest magnitudes are ``amax``; NaN stays NaN.

    The power of two is taken from the exponent's bits: a logarithm rounded the wrong way would double a scale,
    or halve it and saturate the block.
    """
    # clamp keeps NaN, so that a broken tensor is not written down as a clean one.
    scale = amax.float().clamp(min=max(amax_floor, AMAX_FLOOR)) / FP8_MAX
    if scale_fmt is None:
        return scale
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite(), rounded, scale)


def to_fp8(scaled: torch.Tensor) -> torch.Tensor:
    """Cast to E4M3, saturating: torch's cast makes NaN of what lies beyond the largest code."""
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _spread(scale: torch.Tensor, block: tuple[int, int], rows: int, cols: int) -> torch.Tensor:
    """[r, c] scales of blocks -> [rows, cols] scales of elements, the ragged edge cut off."""
    return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :cols]


def _slabs(rows: int, cols: int, block_rows: int):
    """Row ranges of whole blocks with about SLAB_ELEMENTS elements each, with the range of their scale rows."""
    blocks = max(1, SLAB_ELEMENTS // max(1, cols * block_rows))
    step = blocks * block_rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), slice(start // block_rows, -(-stop // block_rows))


def _block_amax(slab: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude of each block of a float32 [rows, cols] slab, zero-padded to whole blocks."""
    rows, cols = slab.shape
    padded = F.pad(slab, (0, -cols % block[1], 0, -rows % block[0]))
    tiles = padded.abs().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # [r, 128, c, 128]
    return tiles.amax(dim=(1, 3))


def quantize_weight(w, block, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.quantize_weight``."""
    *lead, rows, cols = w.shape
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scale_shape = (*lead, math.ceil(rows / block[0]), math.ceil(cols / block[1]))
    scale = torch.empty(scale_shape, dtype=torch.float32, device=w.device)
    if w.numel() == 0:
        return codes, scale.zero_()
    flat_codes, flat_scale = codes.view(-1, rows, cols), scale.view(-1, *scale_shape[-2:])
    for index in range(flat_codes.shape[0]):
        matrix = w[_unravel(index, lead)]
        for here, scale_rows in _slabs(rows, cols, block[0]):
            slab = matrix[here].float()
            s = scale_from_amax(_block_amax(slab, block), scale_fmt, amax_floor)
            flat_scale[index, scale_rows] = s
            flat_codes[index, here] = to_fp8(slab / _spread(s, block, *slab.shape))
    return codes, scale


def _unravel(index: int, shape: list[int]) -> tuple[int, ...]:
    """Position of a flat index: reshape would copy a strided expert stack whole."""
    position: list[int] = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        position.insert(0, rest)
    return tuple(position)


def dequantize_weight(codes, scale, block, dtype):
    """See ``deepseek_v3.kernels.dequantize_weight``."""
    *lead, rows, cols = codes.shape
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel() == 0:
        return out
    flat_out = out.view(-1, rows, cols)
    for index in range(flat_out.shape[0]):
        position = _unravel(index, lead)
        for here, scale_rows in _slabs(rows, cols, block[0]):
            slab = codes[position][here].float()
            flat_out[index, here] = slab.mul_(_spread(scale[position][scale_rows].float(), block, *slab.shape))
    return out


def quantize_activation(x, group, scale_fmt, amax_floor):
    """See ``deepseek_v3.kernels.quantize_activation``."""
    width = x.shape[-1]
    wide = x.float()
    tiles = F.pad(wide, (0, -width % group)).unflatten(-1, (-1, group))  # [..., groups, 128]
    scale = scale_from_amax(tiles.abs().amax(dim=-1), scale_fmt, amax_floor)
    return to_fp8(wide / scale.repeat_interleave(group, -1)[..., :width]), scale


def dequantize_activation(codes, scale, group, dtype):
    """See ``deepseek_v3.kernels.dequantize_activation``."""
    return (codes.float() * scale.float().repeat_interleave(group, -1)[..., : codes.shape[-1]]).to(dtype)
