"""Launcher of the absorbed MLA decode: tile sizes by the number of query rows, splits by the size of the card."""

import functools

import torch
import triton

from ..dispatch import capability, processors
from ..tuning import bucket
from .launching import Launcher, cdiv, next_power_of_2
from .mla import mla_combine, mla_split
from .mla_fp8 import mla_split_fp8, widen_latents
from .tilings import (
    FEW_ROWS,
    FEW_ROWS_FP8,
    FEW_ROWS_FP8_BY_HAND,
    MANY_ROWS,
    MANY_ROWS_BY_HAND,
    MANY_ROWS_POINTERS,
    SMALL_CARD,
    SOME_ROWS,
    AttentionTiling,
    tuned,
)

NO_WINDOW = 1 << 30
# Query rows times cached slots up to which the compiler's kernels are the faster ones: 128 heads over 4,096 slots.
LITTLE = 128 << 12
LOG2_E = 1.4426950408889634

_combine = Launcher(mla_combine)


def tiling_for(rows: int, rank: int, fp8: bool, hopper: bool, aligned: bool, by_hand: bool) -> AttentionTiling:
    """The tiling for ``rows`` queries a batch row and latents of ``rank``; ``aligned``: TMA can read the cache.

    by_hand: the card and the sizes suit the hand-written kernel.
    """
    if not hopper:
        return SMALL_CARD
    if fp8:
        return FEW_ROWS_FP8_BY_HAND if by_hand and aligned and rank == 512 else FEW_ROWS_FP8
    if rows <= 16:
        return FEW_ROWS
    if by_hand and aligned:
        return MANY_ROWS_BY_HAND
    # Halves narrower than 128 make too small a product.
    if rows <= 32 or rank < 256:
        return SOME_ROWS
    return MANY_ROWS if aligned else MANY_ROWS_POINTERS


def tma_ready(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address it: rows dense, base and strides multiples of 16 bytes."""
    size = tensor.element_size()
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    )


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory in which Triton writes the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def splits_for(programs: int, slots: int, tiling: AttentionTiling, multiprocessors: int) -> int:
    """Splits of the cached length so that each multiprocessor is about full and no program waits.

    Not one fewer where the last would be empty: `slots` may be what a cache has room for, and a step that a graph
    replays over all of it gives what one over the cached part alone does.
    """
    steps = cdiv(slots, tiling.slots)
    most = cdiv(min(steps, tiling.long), tiling.least)
    if steps > tiling.long:
        most = max(most, cdiv(steps, 2 * tiling.least))
    return max(1, min(multiprocessors * tiling.programs // programs, most))


def join_tile(splits: int, rank: int) -> tuple[int, int]:
    """Columns and warps of a program that joins ``splits`` parts, all of them in registers: at most 64 of a thread."""
    cols = min(rank, 256 if splits <= 8 else 128 if splits <= 32 else 64)
    return cols, max(2, next_power_of_2(splits) * cols // 2048)


def early(device: torch.device) -> dict[str, bool]:
    """How the pass that joins the splits is launched: on Hopper and later before the splits are done."""
    if device.type == "cuda" and capability(device.index) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def widen(codes, scale, dtype, lengths, starts):
    """FP8 latents [B, S, C] in ``dtype``, in the slots in use; the others are left unwritten."""
    batch, slots, rank = codes.shape
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, 8192 // rank)
    widen_latents[(cdiv(slots, rows), batch)](
        codes, scale, out, lengths, starts, slots, *codes.stride()[:2], *scale.stride(),
        C=rank, ROWS=rows, LENGTHS=lengths is not None, STARTS=starts is not None, num_warps=4,
    )  # fmt: skip
    return out


def choose_tiling(q_latent, latent, rope, fp8):
    """The tiling for these inputs on their card; the interpreter counts as a Hopper card without Gluon."""
    batch, queries, heads, rank = q_latent.shape
    rows, device = queries * heads, q_latent.device
    card = capability(device.index) if device.type == "cuda" else (9, 0)
    by_hand = device.type == "cuda" and card == (9, 0) and rank in (256, 512) and rope.shape[2] == 64
    # Where there is little to do, halves make more programs, which matters more than doing nothing twice.
    by_hand = by_hand and (fp8 or batch * rows * latent.shape[1] > LITTLE)
    return tiling_for(rows, rank, fp8, card >= (9, 0), tma_ready(latent) and tma_ready(rope), by_hand)


# What the list of a fixed tiling is called; the others have none.
LISTED = {FEW_ROWS: "mla_few", SMALL_CARD: "mla_few", MANY_ROWS_BY_HAND: "mla_by_hand"}


def split_kernel(tiling, q_latent, q_rope, latent, rope, latent_scale, lengths, starts, scale):
    """The launcher of the tiling's kernel, and its numbers and constants for these tensors."""
    batch, queries, heads, _ = q_latent.shape
    strides = (*q_latent.stride()[:3], *q_rope.stride()[:3], *latent.stride()[:2], *rope.stride()[:2])
    if batch == 1:
        # The one row is at no distance, and a cache that grows is no other kernel's.
        strides = (0, *strides[1:3], 0, *strides[4:6], 0, strides[7], 0, strides[9])
    options = {"LENGTHS": lengths is not None, "STARTS": starts is not None}
    warps = {"num_warps": tiling.warps}
    widths = {"C": latent.shape[2], "R": rope.shape[2]}
    blocks = {"BLOCK_M": tiling.rows, "BLOCK_N": tiling.slots}
    if latent_scale is not None:
        of_batch, of_slot, of_group = latent_scale.stride()
        if tiling.gluon:
            strides = (*strides, of_batch)
            options |= {"STAGES": tiling.stages, "N": tiling.slots, "LONG": tiling.long, "S_S": of_slot}
            name, constants = "mla_split_fp8_hopper", options | warps
        else:
            strides = (*strides, of_batch, of_slot, of_group)
            name, constants = "mla_split_fp8", widths | blocks | options | warps
    elif tiling.gluon:
        name, constants = "mla_split_hopper", widths | options | warps
    else:
        more = {"HALVES": tiling.halves, "TMA": tiling.tma, "STAGES": tiling.stages}
        name, constants = "mla_split", widths | blocks | options | more | warps
    return _launcher(name), (queries, heads, scale * LOG2_E, *strides), constants


@functools.cache
def _launcher(name):
    """Of a kernel by its name; those in Gluon are imported where they run."""
    if name == "mla_split_hopper":
        from .mla_hopper import mla_split_hopper

        return Launcher(mla_split_hopper)
    if name == "mla_split_fp8_hopper":
        from .mla_fp8_hopper import mla_split_fp8_hopper

        return Launcher(mla_split_fp8_hopper)
    return Launcher({"mla_split": mla_split, "mla_split_fp8": mla_split_fp8}[name])


def plan(q_latent, latent, rope, fp8, tune=None):
    """The tiling for these inputs, how many tiles of rows it makes, and in how many splits the cache is read.

    tune: where timing may choose, what launches with ``tiling=``.
    """
    batch, queries, heads, rank = q_latent.shape
    slots, device, rows = latent.shape[1], q_latent.device, queries * heads
    tiling = choose_tiling(q_latent, latent, rope, fp8)
    if tune is not None and tiling in LISTED:
        sizes = {"batch": bucket(batch), "rows": rows, "slots": bucket(slots), "rank": rank}
        tiling = tuned(LISTED[tiling], tiling, latent, tune, **sizes)
    return (tiling, *tiles_and_splits(tiling, batch, rows, slots, device))


def tiles_and_splits(tiling, batch, rows, slots, device):
    """Tiles of rows, and splits of the cached length."""
    tiles = cdiv(rows, tiling.rows) * tiling.halves
    multiprocessors = processors(device.index) if device.type == "cuda" else 7
    return tiles, splits_for(tiles * batch, slots, tiling, multiprocessors)


def mla_decode(q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window, tiling=None):
    """See ``deepseek_v3.kernels.mla_decode``; all tensors' last dimensions are dense."""
    batch, queries, heads, rank = q_latent.shape
    rows = queries * heads
    if scale <= 0:
        # The kernels take the largest logit before they scale.
        q_latent, q_rope, scale = -q_latent, -q_rope, -scale or 1e-30
    if latent_scale is not None and (rows > FEW_ROWS_FP8.rows or rope.dtype != q_latent.dtype):
        latent, rope = widen(latent, latent_scale, q_latent.dtype, lengths, starts), rope.to(q_latent.dtype)
        latent_scale = None
    if tiling is None:
        again = functools.partial(
            mla_decode, q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window
        )
        tiling, tiles, splits = plan(q_latent, latent, rope, latent_scale is not None, again)
    else:
        tiles, splits = tiles_and_splits(tiling, batch, rows, latent.shape[1], q_latent.device)
    # One split is the result itself, in the queries' dtype; several are float32.
    dtype = torch.float32 if splits > 1 else q_latent.dtype
    partial = torch.empty(batch, rows, splits, rank, dtype=dtype, device=q_latent.device)
    partial_lse = torch.empty(batch, rows, splits, dtype=torch.float32, device=q_latent.device)
    if tiling.tma and q_latent.is_cuda:
        triton.set_allocator(scratch)
    coded = () if latent_scale is None else (latent_scale,)
    launch, numbers, constants = split_kernel(
        tiling, q_latent, q_rope, latent, rope, latent_scale, lengths, starts, scale
    )
    tensors = (q_latent, q_rope, latent, rope, *coded, lengths, starts, partial, partial_lse)
    changing = (latent.shape[1], splits, sliding_window or NO_WINDOW)
    launch((tiles, splits, batch), tensors, numbers, changing, **constants)
    if splits == 1:
        return partial.view(q_latent.shape), partial_lse.view(batch, queries, heads)
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q_latent.device)
    cols, warps = join_tile(splits, rank)
    _combine(
        (batch * rows, rank // cols, 1), (partial, partial_lse, out, lse), (), (splits,),
        C=rank, COLS=cols, SPLITS=next_power_of_2(splits), **early(q_latent.device), num_warps=warps,
    )  # fmt: skip
    return out, lse
