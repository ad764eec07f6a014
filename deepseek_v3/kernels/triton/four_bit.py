"""The kernel that widens 4-bit codes, of all matrices of a stack or of some, in one launch."""

import triton
import triton.language as tl


@triton.jit
def widen_blocks(
    codes, absmax, nested_absmax, offset, table, nested_table, chosen, out, numbers, length, blocks, outer,
    CHOSEN: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of 64 numbers of one matrix of ``out`` [H, numbers]; codes [E, length] hold two a byte."""
    matrix = tl.program_id(1).to(tl.int64)
    source = matrix
    if CHOSEN:
        source = tl.load(chosen + matrix).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    most = tl.load(absmax + source * blocks + block, mask=live, other=0)
    if NESTED:
        factor = tl.load(nested_absmax + source * outer + block // 256, mask=live, other=0.0)
        most = tl.load(nested_table + most.to(tl.int32)) * factor + tl.load(offset + source)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(codes + source * length + byte, mask=byte < length, other=0).to(tl.int32)
    # The high half of a byte comes first.
    wide = tl.interleave(tl.load(table + (pair >> 4)), tl.load(table + (pair & 15))) * most[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + matrix * numbers + place, wide.to(out.dtype.element_ty), mask=place < numbers)
