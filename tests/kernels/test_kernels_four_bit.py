"""Widened 4-bit matrices against the definition, number by number, and against bitsandbytes' own functions."""

import pytest
import torch
from bitsandbytes import functional

from deepseek_v3.kernels import widen_4bit

# Odd, within one block, a last block that is not full, several factors of nested maxima.
NUMBERS = [1, 63, 64, 1000, 64 * 300 + 37]


def packed(matrices, numbers, nested):
    """Any codes under any maxima."""
    blocks = -(-numbers // 64)
    codes = torch.randint(0, 256, (matrices, -(-numbers // 2)), dtype=torch.uint8)
    table = torch.randn(16)
    if not nested:
        return codes, torch.rand(matrices, blocks) + 0.5, table, None
    absmax = torch.randint(0, 256, (matrices, blocks), dtype=torch.uint8)
    return codes, absmax, table, (torch.rand(matrices, -(-blocks // 256)), torch.randn(matrices), torch.randn(256))


def truth(codes, absmax, table, numbers, nested):
    if nested is not None:
        factors, mean, nested_table = nested
        most = [
            [nested_table[int(m)] * factors[e, b // 256] + mean[e] for b, m in enumerate(row)]
            for e, row in enumerate(absmax)
        ]
        absmax = torch.tensor(most)
    # Products of two float32 are exact in Python's numbers; torch.tensor rounds them once.
    rows, absmax, table = codes.tolist(), absmax.tolist(), table.tolist()
    return torch.tensor(
        [
            [table[row[i // 2] % 16 if i % 2 else row[i // 2] // 16] * most[i // 64] for i in range(numbers)]
            for row, most in zip(rows, absmax, strict=True)
        ]
    )


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("chosen", [None, [2, 0, 2]])
def test_every_number_is_its_code_times_its_blocks_maximum(target, numbers, nested, chosen):
    codes, absmax, table, inner = packed(3 if numbers < 5000 else 1, numbers, nested)
    chosen = None if chosen is None else torch.tensor(chosen) % len(codes)
    expected = truth(codes, absmax, table, numbers, inner)
    expected = expected if chosen is None else expected[chosen]
    there = [None if t is None else t.to(target.device) for t in (codes, absmax, table, chosen)]
    inner = None if inner is None else tuple(t.to(target.device) for t in inner)
    for dtype in (target.dtype, torch.float32):
        got = widen_4bit(*there[:3], numbers, nested=inner, chosen=there[3], dtype=dtype, backend=target.backend)
        assert got.dtype == dtype and torch.equal(got.cpu(), expected.to(dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_it_is_what_bitsandbytes_widens(target, kind):
    # Whole blocks a row: with AVX-512 the CPU build of bitsandbytes takes no others.
    matrix = torch.randn(96, 192)
    codes, state = functional.quantize_4bit(matrix, quant_type=kind, compress_statistics=True)
    expected = functional.dequantize_4bit(codes, state)
    inner = (state.state2.absmax[None], state.offset[None], state.state2.code)
    given = (codes.view(1, -1), state.absmax[None], functional.get_4bit_type(kind, device="cpu"))
    got = widen_4bit(
        *(t.to(target.device) for t in given),
        matrix.numel(),
        nested=tuple(t.to(target.device) for t in inner),
        dtype=torch.float32,
        backend=target.backend,
    )
    # The CPU build of bitsandbytes has its own digits of FP4's table.
    torch.testing.assert_close(got.cpu().view_as(matrix), expected, rtol=1e-6 if kind == "nf4" else 2e-3, atol=0)


def test_bad_input():
    codes, absmax, table, nested = packed(2, 130, True)
    with pytest.raises(ValueError, match=r"codes must be uint8 \[E, 64\], got torch.uint8 \(2, 65\)"):
        widen_4bit(codes, absmax, table, 128, nested=nested)
    with pytest.raises(ValueError, match=r"absmax must be torch.float32 \[E, 3\], got torch.uint8 \(2, 3\)"):
        widen_4bit(codes, absmax, table, 130)
    with pytest.raises(ValueError, match=r"factors \[E, 1\] and means \[E\]"):
        widen_4bit(codes, absmax, table, 130, nested=(nested[0][:1], *nested[1:]))
