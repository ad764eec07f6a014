"""Bands of rows through the FP8 codec, in raw integers on both sides.

Special about it, on the CPU: E4M3 and BF16 share their layout up to the exponent's bias, so a code becomes a float by
one shift and a multiplication by 2**120 (which is exact, subnormals included), about eight times as fast as a cast;
and a block's largest magnitude is found among the weights' bits, which order as their values do. Both work in buffers
that stay in the cache. The results are those of `dequantize_weight` and `quantize_weight`, bit for bit; a GPU runs
these two themselves.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from deepseek_v3.kernels import dequantize_weight, quantize_weight

BLOCK = 128
_BIAS_GAP = 2.0**120
# Sign, exponent and mantissa of a code that was sign-extended to 16 bits and moved up by four.
_CODE_BITS = 0x87F0 - (1 << 16)
_NAN_CODE = 0x07F0
_MAGNITUDE = 0x7FFF


class BadValues(ValueError):
    """NaN or infinity where a weight should be."""


def prepare_worker(threads: int) -> None:
    """Settings of a process that encodes and decodes: its share of the cores, and subnormals kept."""
    torch.set_num_threads(threads)
    # Codes pass through BF16 subnormals; a flushed one would be a lost weight.
    torch.set_flush_denormal(False)


def decode(codes: np.ndarray, scale: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Dequantise whole 128-row bands.

    Args:
        codes: uint8 [rows, columns], E4M3 bits.
        scale: float32 [ceil(rows / 128), ceil(columns / 128)].
        device: where the product is computed.

    Returns:
        uint16 [rows, columns], BF16 bits.

    Raises:
        BadValues: a code is NaN.
    """
    if device != "cpu":
        on_device = torch.from_numpy(codes).to(device).view(torch.float8_e4m3fn)
        values = dequantize_weight(on_device, torch.from_numpy(scale).to(device))
        if values.isnan().any():
            raise BadValues("holds NaN codes")
        return values.cpu().view(torch.int16).numpy().view(np.uint16)
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    signed = torch.from_numpy(codes).view(torch.int8)
    table = torch.from_numpy(scale)
    for begin in range(0, rows, BLOCK):
        band = slice(begin, min(begin + BLOCK, rows))
        bits, values = _buffers(band.stop - begin, columns)
        bits.copy_(signed[band]).bitwise_left_shift_(4).bitwise_and_(_CODE_BITS)
        values.copy_(bits.view(torch.bfloat16)).mul_(_BIAS_GAP)
        if int(bits.bitwise_and_(_NAN_CODE).amax()) == _NAN_CODE:
            raise BadValues("holds NaN codes")
        for part, factors in _blocks(values, table[begin // BLOCK]):
            part.mul_(factors)
        out[band] = values
    return out.view(torch.int16).numpy().view(np.uint16)


@lru_cache(maxsize=4)
def _buffers(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scratch for one band, int16 and float32 [rows, columns]; fresh memory for each band would cost page faults."""
    return torch.empty(rows, columns, dtype=torch.int16), torch.empty(rows, columns)


def _blocks(values: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of [rows, columns] values with the scales that they meet: whole blocks of 128 columns, then the rest."""
    whole = values.shape[1] // BLOCK
    if whole:
        yield values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), scale[:whole, None]
    if values.shape[1] > whole * BLOCK:
        yield values[:, whole * BLOCK :], scale[whole]


def encode(bits: np.ndarray, scale_fmt: str | None, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Quantise whole 128-row bands.

    Args:
        bits: uint16 [rows, columns], BF16 bits.
        scale_fmt: None for `amax / 448`, "ue8m0" for the next power of two.
        device: where it is computed.

    Returns:
        uint8 [rows, columns] of E4M3 bits and float32 [ceil(rows / 128), ceil(columns / 128)].

    Raises:
        BadValues: a weight is NaN or infinite.
    """
    weights = torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)
    rows, columns = weights.shape
    if device != "cpu":
        on_device = quantize_weight(weights.to(device), scale_fmt=scale_fmt)
        codes, scale = (tensor.cpu() for tensor in on_device)
    else:
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        bands = [slice(begin, min(begin + BLOCK, rows)) for begin in range(0, rows, BLOCK)]
        amax = torch.stack([_largest(weights[band]) for band in bands])
        # The rule for scales stays in one place: a block of one element is its own largest magnitude.
        scale = quantize_weight(amax, block=(1, 1), scale_fmt=scale_fmt)[1]
        for band, divisors in zip(bands, scale, strict=True):
            _encode_band(weights[band], divisors, codes[band])
    if not scale.isfinite().all():
        raise BadValues("holds NaN or infinity")
    return codes.view(torch.uint8).numpy(), scale.numpy()


def _largest(weights: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes, BF16 [ceil(columns / 128)], of one row of blocks [up to 128, columns]."""
    bits, _ = _buffers(*weights.shape)
    torch.bitwise_and(weights.view(torch.int16), _MAGNITUDE, out=bits)
    columns = F.pad(bits.amax(0), (0, -weights.shape[1] % BLOCK))
    return columns.view(-1, BLOCK).amax(1).view(torch.bfloat16)


def _encode_band(weights: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> None:
    """One row of blocks: BF16 [up to 128, columns] and scales [ceil(columns / 128)] into codes of its shape."""
    _, values = _buffers(*weights.shape)
    values.copy_(weights)
    for part, divisors in _blocks(values, scale):
        part.div_(divisors)
    # No quotient exceeds 448 by more than a rounding, and the cast takes that back.
    codes.copy_(values)


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """BF16 bits (uint16) or E8M0 exponents (uint8) as float32 bits (uint32), exactly."""
    if dtype == "BF16":
        return raw.astype(np.uint32) << 16
    assert dtype == "F8_E8M0", dtype
    # Exponent 0 stands for 2**-127, which float32 holds as a subnormal.
    return np.where(raw == 0, np.uint32(1 << 22), raw.astype(np.uint32) << 23).astype(np.uint32)
