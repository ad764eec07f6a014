"""The fixed tilings on cards that are not at hand: each kernel is compiled for one, down to machine code, and must fit
into its shared memory; those written by hand for Hopper into their registers, too."""

import subprocess

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from deepseek_v3.kernels.triton import (
    fp8,
    grouped,
    grouped_hopper,
    mla,
    mla_fp8,
    mla_fp8_hopper,
    mla_hopper,
    tilings,
)

# Shared memory that a program may have, bytes: CUDA C++ Programming Guide, compute capabilities.
ROOM = {86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
BF16, CODES, FLOAT, INT = "*bf16", "*fp8e4nv", "*fp32", "*i32"
EXPERTS = {"BLOCK_E": 512, "PRECISION": "tf32"}
ROWS = {"x": BF16, "w": BF16, "out": BF16, "offsets": INT}
NO_SCALES = {"x_scale": None, "w_scale": None}
SCALES = {"x_scale": FLOAT, "w_scale": FLOAT}
CACHE = {"q_latent": BF16, "q_rope": BF16, "rope": BF16, "lengths": INT, "starts": INT, "out": FLOAT, "lse": FLOAT}


def tile(tiling):
    return {"BLOCK_M": tiling.rows, "BLOCK_N": tiling.columns, "BLOCK_K": tiling.depth}


def few(swiglu):
    tiling = tilings.FEW_SWIGLU if swiglu else tilings.FEW
    constants = EXPERTS | NO_SCALES | tile(tiling) | {"GATHER": True, "SWIGLU": swiglu, "FP8": False}
    return grouped.grouped_few, ROWS | {"order": "*i64"}, constants, tiling


def many(tiling, fp8_codes):
    kinds = ROWS | SCALES | {"x": CODES, "w": CODES} if fp8_codes else ROWS
    constants = EXPERTS | ({} if fp8_codes else NO_SCALES) | tile(tiling) | {"x_tiles": None, "w_tiles": None}
    constants |= {"GROUP_M": tiling.band, "FP8": fp8_codes, "TMA": False, "TRANSPOSED": False}
    return grouped.grouped_rows, kinds, constants, tiling


def decode(fp8_codes):
    tiling = tilings.SMALL_CARD
    kinds = CACHE | {"latent": CODES if fp8_codes else BF16, "latent_scale": FLOAT, "scale_log2": "fp32"}
    constants = {"C": 512, "R": 64, "BLOCK_M": tiling.rows, "BLOCK_N": tiling.slots, "LENGTHS": True, "STARTS": True}
    if fp8_codes:
        return mla_fp8.mla_split_fp8, kinds, constants, tiling
    return mla.mla_split, kinds, constants | {"HALVES": 1, "TMA": False, "STAGES": tiling.stages}, tiling


def dense():
    kinds = {"a": CODES, "b": CODES, "out": BF16, "a_scale": FLOAT, "b_scale": FLOAT}
    constants = {"BLOCK_M": 64, "BLOCK_N": 128, "BAND": 32, "a_tiles": None, "b_tiles": None}
    return fp8.fp8_matmul, kinds, constants | {"TMA": False, "BY_ROW": False, "ADD": False}, tilings.FP8_DENSE


def compile_for(card, kernel, kinds, constants, tiling, source=ASTSource):
    """The kernel compiled for a card; every number is a multiple of 16."""
    signature, divisible = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = "constexpr" if name in constants else kinds.get(name, "i32")
        if signature[name] not in ("constexpr", "fp32") and not signature[name].startswith("tensordesc"):
            divisible[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    source = source(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


@pytest.mark.parametrize(
    ("card", "launch"),
    [
        (86, few(swiglu=False)),
        (86, few(swiglu=True)),
        (86, many(tilings.PLAIN, fp8_codes=False)),
        (86, decode(fp8_codes=False)),
        (89, many(tilings.FP8_MANY, fp8_codes=True)),
        (89, decode(fp8_codes=True)),
        (89, dense()),
    ],
    ids=["few", "few-swiglu", "rows", "decode", "rows-fp8", "decode-fp8", "dense-fp8"],
)
def test_the_fixed_tiling_fits_the_card(card, launch):
    compiled = compile_for(card, *launch)
    assert len(compiled.asm["cubin"]) > 1000
    assert 0 < compiled.metadata.shared <= ROOM[card]


def by_hand(fp8_codes):
    tiling = tilings.FEW_ROWS_FP8_BY_HAND if fp8_codes else tilings.MANY_ROWS_BY_HAND
    kinds = CACHE | {"latent": CODES if fp8_codes else BF16, "latent_scale": FLOAT, "scale_log2": "fp32"}
    constants = {"queries": 1, "LENGTHS": True, "STARTS": True}
    if fp8_codes:
        constants |= {"STAGES": tiling.stages, "N": tiling.slots, "LONG": tiling.long, "S_S": 4}
        return mla_fp8_hopper.mla_split_fp8_hopper, kinds, constants, tiling
    return mla_hopper.mla_split_hopper, kinds, constants | {"C": 512, "R": 64}, tiling


def tiles(kind, *block):
    """The type of a tensor descriptor in a signature."""
    layout = NVMMASharedLayout(128, 8 if kind == CODES else 16, len(block))
    return f"tensordesc<{kind[1:]}{list(block)},{layout!r}>"


def rows_by_hand(kind, transposed):
    tiling = tilings.FP8_MANY_BY_HAND if kind == CODES else tilings.MANY_BY_HAND
    box = (tiling.depth, tiling.columns) if transposed else (tiling.columns, tiling.depth)
    kinds = ROWS | SCALES | {"counter": INT, "x_tiles": tiles(kind, 64, tiling.depth)}
    kinds |= {"w_tiles": tiles(kind, 1, *box), "out_tiles": tiles(BF16, 64, 128)}
    constants = {"DEPTH": tiling.depth, "STAGES": tiling.stages, "BAND": tiling.band, "FP8": kind == CODES}
    constants |= {"TRANSPOSED": transposed} | ({} if kind == CODES else NO_SCALES)
    return grouped_hopper.grouped_rows_hopper, kinds, constants, tiling


def columns_by_hand():
    tiling = tilings.COLUMNS_BY_HAND
    kinds = ROWS | {"dy": BF16, "counter": INT, "out_tiles": tiles(BF16, 1, 64, 128)}
    return grouped_hopper.grouped_columns_hopper, kinds, {"DEPTH": tiling.rows, "STAGES": tiling.stages}, tiling


BY_HAND = {
    "decode": by_hand(fp8_codes=False),
    "decode-fp8": by_hand(fp8_codes=True),
    "rows": rows_by_hand(BF16, transposed=False),
    "rows-transposed": rows_by_hand(BF16, transposed=True),
    "rows-fp8": rows_by_hand(CODES, transposed=False),
    "columns": columns_by_hand(),
}


def test_the_steps_of_the_decode_are_those_of_its_tilings():
    assert tilings.FEW_ROWS_FP8_BY_HAND.least == tilings.MANY_ROWS_BY_HAND.least == mla_hopper.LEAST.value
    assert tilings.MANY_ROWS_BY_HAND.long == mla_hopper.NEVER.value


def test_the_tiles_of_the_grouped_products_are_those_of_their_tilings():
    for tiling in (tilings.MANY_BY_HAND, tilings.FP8_MANY_BY_HAND):
        assert (tiling.rows, tiling.columns) == (2 * grouped_hopper.ROWS.value, grouped_hopper.COLUMNS.value)
    tiling = tilings.COLUMNS_BY_HAND
    assert (tiling.depth, tiling.columns) == (2 * grouped_hopper.ROWS.value, grouped_hopper.COLUMNS.value)


@pytest.mark.parametrize("name", BY_HAND)
def test_kernels_written_for_hopper_keep_their_registers(name, tmp_path):
    """Nothing spilled, and no products in a row for want of registers: the assembler tells."""
    launch = BY_HAND[name]
    compiled = compile_for(90, *launch, source=GluonASTSource)
    programs = getattr(launch[-1], "programs", 1)
    assert 0 < compiled.metadata.shared + 1024 <= (ROOM[90] + 1024) // programs
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    assembler = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(assembler, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said and "(C75" not in said
