"""Kernels of the grouped matrix products for many rows an expert on Hopper, in Gluon: three kinds of warps at work.

As many programs as multiprocessors, each of which takes tile after tile of 128 rows and 256 columns. One warp feeds a
ring of operands through the copy engine and runs ahead into the next tile while the last one is stored. Two warpgroups
have 64 rows each; in FP8, while one adds up its 128 products in float32, the tensor cores serve the other.

Whichever program is free takes the next tile: those that share weights then run at the same time, and read them from
the L2, however much the experts' rows differ.

Deterministic: each output element is summed by one program in one order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# A tile: rows of each warpgroup, and columns, which are staged by halves for the copy engine to store.
ROWS = gl.constexpr(64)
COLUMNS = gl.constexpr(256)
HALF = gl.constexpr(128)


@gluon.jit
def _seek(offsets, tile, e, start, end, first, experts, n_tiles):
    """Moves on to the expert of a tile: the expert, its first row and end, its first tile; ``experts``: none is left.

    From the expert of an earlier tile.
    """
    count = (end - start + 2 * ROWS - 1) // (2 * ROWS) * n_tiles
    while (e < experts) & (tile >= first + count):
        e += 1
        first += count
        start = gl.load(offsets + gl.minimum(e, experts))
        end = gl.load(offsets + gl.minimum(e + 1, experts))
        count = (end - start + 2 * ROWS - 1) // (2 * ROWS) * n_tiles
    return e, start, end, first


@gluon.jit
def _first(offsets, tile, experts, n_tiles):
    """The expert of a program's first tile, as of `_seek`."""
    none = gl.to_tensor(0)
    return _seek(offsets, tile, none - 1, none, none, none, experts, n_tiles)


@gluon.jit
def _place(local, start, end, n_tiles, BAND: gl.constexpr):
    """First row and column tile of an expert's tile: row tiles that share weights are neighbours, BAND at most."""
    band = local // (BAND * n_tiles) * BAND
    height = gl.minimum((end - start + 2 * ROWS - 1) // (2 * ROWS) - band, BAND)
    inside = local % (BAND * n_tiles)
    return start + (band + inside % height) * (2 * ROWS), inside // height


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and the parity of its round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    """The stage before."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _take(counter, told, known, heard, turn):
    """The copying warp takes the next tile for its program and tells the warpgroups."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tile = gl.atomic_add(counter, 1, sem="relaxed")
    mbarrier.wait(heard.index(turn & 1), (turn >> 1 & 1) ^ 1)
    told.index(turn & 1).store(gl.full([1], 0, gl.int32, layout) + tile)
    mbarrier.arrive(known.index(turn & 1), count=1)
    return tile, turn + 1


@gluon.jit
def _hear(told, known, heard, turn):
    """A warpgroup hears of the program's next tile."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(known.index(turn & 1), turn >> 1 & 1)
    tile = gl.sum(told.index(turn & 1).load(layout), 0)
    mbarrier.arrive(heard.index(turn & 1), count=1)
    return tile, turn + 1


@gluon.jit
def _open_line():
    """Where tiles are told: two at a time, each known when the copying warp has taken it."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    told = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    known = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(known.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    return told, known, heard


@gluon.jit
def _open_ring(STAGES: gl.constexpr):
    """Barriers of a ring: full by the copy engine, free when both warpgroups are through."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    return full, free


@gluon.jit
def _feed(
    x_tiles, w_tiles, offsets, counter, x_s, w_s, full, free, told, known, heard, experts, n_tiles, K,
    DEPTH: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """The copying warp: two boxes of 64 rows of x, one where the expert has no more, and one of w a stage."""
    SIZE: gl.constexpr = x_tiles.dtype.primitive_bitwidth // 8
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    tile, turn = _take(counter, told, known, heard, gl.to_tensor(0))
    e, start, end, first = _first(offsets, tile, experts, n_tiles)
    while e < experts:
        row, n_tile = _place(tile - first, start, end, n_tiles, BAND)
        both = row + ROWS < end
        for k in range(0, K, DEPTH):
            mbarrier.wait(free.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (2 * ROWS + COLUMNS) * DEPTH * SIZE, pred=both)
            mbarrier.expect(bar, (ROWS + COLUMNS) * DEPTH * SIZE, pred=both ^ True)
            tma.async_copy_global_to_shared(x_tiles, [row, k], bar, x_s.index(2 * stage))
            tma.async_copy_global_to_shared(x_tiles, [row + ROWS, k], bar, x_s.index(2 * stage + 1), pred=both)
            at = [e, k, n_tile * COLUMNS] if TRANSPOSED else [e, n_tile * COLUMNS, k]
            tma.async_copy_global_to_shared(w_tiles, at, bar, w_s.index(stage))
            stage, phase = _after(stage, phase, STAGES)
        tile, turn = _take(counter, told, known, heard, turn)
        e, start, end, first = _seek(offsets, tile, e, start, end, first, experts, n_tiles)


@gluon.jit
def _sum(
    x_s, w_s, full, free, stage, phase, K,
    W: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """The left and right half of a tile's products, one step ahead of what is waited for.

    BY_ROW: x_s holds [ROWS, DEPTH] a stage and warpgroup, else [DEPTH, ROWS]; TRANSPOSED: w_s [DEPTH, COLUMNS], else
    [COLUMNS, DEPTH].
    """
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    for k in range(0, K, DEPTH):
        mbarrier.wait(full.index(stage), phase)
        x = x_s.index(2 * stage + W)
        if not BY_ROW:
            x = x.permute((1, 0))
        w = w_s.index(stage).reshape([DEPTH, COLUMNS] if TRANSPOSED else [COLUMNS, DEPTH])
        if not TRANSPOSED:
            w = w.permute((1, 0))
        acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index(_before(stage, STAGES)), count=1, pred=k > 0)
        stage, phase = _after(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(_before(stage, STAGES)), count=1, pred=K > 0)
    left, right = acc.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
    return left, right, stage, phase


@gluon.jit
def _scaled_sum(
    x_s, w_s, full, free, stage, phase, K, x_scale, w_scale, live, to_right, xs_k, ws_k,
    W: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """As `_sum`, in FP8, one half after the other; scales are loaded a step ahead.

    x_scale: of each row; w_scale: of the left half, ``to_right`` before that of the right one.
    """
    left = gl.zeros([ROWS, HALF], gl.float32, layout)
    right = left
    part = left
    scale = gl.load(x_scale, mask=live, other=0.0)
    of_left, of_right = gl.load(w_scale), gl.load(w_scale + to_right)
    steps = (K + 127) // 128
    for k in range(steps):
        mbarrier.wait(full.index(stage), phase)
        x = x_s.index(2 * stage + W)
        w = w_s.index(stage).reshape([COLUMNS, 128])
        part = warpgroup_mma(x, w.slice(0, HALF).permute((1, 0)), part, use_acc=False, is_async=True)
        ahead = gl.minimum(k + 1, steps - 1)
        next_scale = gl.load(x_scale + ahead * xs_k, mask=live, other=0.0)
        next_left, next_right = gl.load(w_scale + ahead * ws_k), gl.load(w_scale + ahead * ws_k + to_right)
        part = warpgroup_mma_wait(0, deps=[part])
        # The tensor cores keep about 14 bits of a sum: each 128 products are added in float32 outside them.
        left += part * (scale * of_left)[:, None]
        part = warpgroup_mma(x, w.slice(HALF, HALF).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage), count=1)
        right += part * (scale * of_right)[:, None]
        scale, of_left, of_right = next_scale, next_left, next_right
        stage, phase = _after(stage, phase, STAGES)
    return left, right, stage, phase


@gluon.jit
def _pass(full, free, stage, phase, K, DEPTH: gl.constexpr, STAGES: gl.constexpr):
    """A tile of which this warpgroup has no rows: in step with the other one, which it leaves the tensor cores."""
    for _ in range(0, K, DEPTH):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(free.index(stage), count=1)
        stage, phase = _after(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _keep(out_tiles, staging, value, at):
    """Stores [ROWS, HALF] through the copy engine."""
    # Only when the last tile has been read is the staging free.
    tma.store_wait(0)
    gl.thread_barrier()
    staging.reshape([ROWS, HALF]).store(value.to(staging.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_tiles, at, staging)


@gluon.jit
def _keep_rows(out, out_tiles, staging, value, row, column, end, columns, out_m):
    """Stores 64 rows of one expert; by themselves where some of them are the next expert's."""
    if row + ROWS <= end:
        _keep(out_tiles, staging, value, [row, column])
    else:
        layout: gl.constexpr = value.type.layout
        m = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        n = column + gl.arange(0, HALF, gl.SliceLayout(0, layout))
        place = out + m.to(gl.int64)[:, None] * out_m + n[None, :]
        gl.store(place, value.to(out.dtype.element_ty), mask=(m < end)[:, None] & (n < columns)[None, :])


@gluon.jit
def _multiply(
    out, out_tiles, offsets, x_scale, w_scale, x_s, w_s, staging, full, free, told, known, heard,
    experts, n_tiles, columns, K, out_m, xs_m, xs_k, ws_e, ws_n, ws_k,
    W: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    FP8: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: its 64 rows of each tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    tile, turn = _hear(told, known, heard, gl.to_tensor(0))
    e, start, end, first = _first(offsets, tile, experts, n_tiles)
    while e < experts:
        row, n_tile = _place(tile - first, start, end, n_tiles, BAND)
        row += W * ROWS
        column = n_tile * COLUMNS
        if row >= end:
            stage, phase = _pass(full, free, stage, phase, K, DEPTH, STAGES)
        else:
            if FP8:
                m = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
                of_rows = x_scale + m.to(gl.int64) * xs_m
                of_tile = w_scale + e.to(gl.int64) * ws_e + column // 128 * ws_n
                # Where the right half lies beyond the last column, it has no scale.
                to_right = gl.where(column + HALF < columns, ws_n, 0)
                left, right, stage, phase = _scaled_sum(
                    x_s, w_s, full, free, stage, phase, K, of_rows, of_tile, m < end, to_right, xs_k, ws_k,
                    W, STAGES, layout,
                )  # fmt: skip
            else:
                left, right, stage, phase = _sum(
                    x_s, w_s, full, free, stage, phase, K, W, DEPTH, STAGES, True, TRANSPOSED
                )
            _keep_rows(out, out_tiles, staging.index(W), left, row, column, end, columns, out_m)
            _keep_rows(out, out_tiles, staging.index(W), right, row, column + HALF, end, columns, out_m)
        tile, turn = _hear(told, known, heard, turn)
        e, start, end, first = _seek(offsets, tile, e, start, end, first, experts, n_tiles)
    tma.store_wait(0)


@gluon.jit
def grouped_rows_hopper(
    x_tiles, w_tiles, out_tiles, out, offsets, counter, x_scale, w_scale,
    experts, columns, K, out_m, xs_m, xs_k, ws_e, ws_n, ws_k,
    DEPTH: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, FP8: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """As ``grouped_rows``, for operands of 16 bits or codes, 128 bytes of each deep, and outputs of 16 bits.

    Launched with four warps, which are the first warpgroup; the others are its own.
    """
    box: gl.constexpr = [1, DEPTH, COLUMNS] if TRANSPOSED else [1, COLUMNS, DEPTH]
    x_s = gl.allocate_shared_memory(x_tiles.dtype, [2 * STAGES, ROWS, DEPTH], x_tiles.layout)
    w_s = gl.allocate_shared_memory(w_tiles.dtype, [STAGES] + box, w_tiles.layout)
    staging = gl.allocate_shared_memory(out_tiles.dtype, [2, ROWS, HALF], out_tiles.layout)
    told, known, heard = _open_line()
    full, free = _open_ring(STAGES)
    n_tiles = (columns + COLUMNS - 1) // COLUMNS
    gl.warp_specialize(
        [
            (_multiply, (
                out, out_tiles, offsets, x_scale, w_scale, x_s, w_s, staging, full, free, told, known, heard,
                experts, n_tiles, columns, K, out_m, xs_m, xs_k, ws_e, ws_n, ws_k,
                0, DEPTH, STAGES, BAND, FP8, TRANSPOSED,
            )),
            (_multiply, (
                out, out_tiles, offsets, x_scale, w_scale, x_s, w_s, staging, full, free, told, known, heard,
                experts, n_tiles, columns, K, out_m, xs_m, xs_k, ws_e, ws_n, ws_k,
                1, DEPTH, STAGES, BAND, FP8, TRANSPOSED,
            )),
            (_feed, (
                x_tiles, w_tiles, offsets, counter, x_s, w_s, full, free, told, known, heard, experts, n_tiles, K,
                DEPTH, STAGES, BAND, TRANSPOSED,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


@gluon.jit
def _feed_columns(
    dy, x, offsets, counter, dy_s, x_s, full, free, told, known, heard, tiles, n_tiles, N, K, dy_m, x_m,
    DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: two boxes of 64 columns of dy and one of x, DEPTH rows a stage.

    Descriptors that end with the expert: rows of the next one arrive as zeros. They are written anew for each expert,
    once what was copied through the old ones is there.
    """
    SIZE: gl.constexpr = dy.dtype.element_ty.primitive_bitwidth // 8
    per_expert = n_tiles * ((K + COLUMNS - 1) // COLUMNS)
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    tile, turn = _take(counter, told, known, heard, gl.to_tensor(0))
    while tile < tiles:
        e = tile // per_expert
        start, end = gl.load(offsets + e), gl.load(offsets + e + 1)
        for i in gl.static_range(STAGES):
            mbarrier.wait(full.index(i), gl.where(stage > i, phase ^ 1, phase))
        room = gl.maximum(end, 1)
        dy_tiles = tma.make_tensor_descriptor(dy, [room, N], [dy_m, 1], [DEPTH, ROWS], dy_s.layout)
        x_tiles = tma.make_tensor_descriptor(x, [room, K], [x_m, 1], [DEPTH, COLUMNS], x_s.layout)
        next_expert = gl.minimum((e + 1) * per_expert, tiles)
        while tile < next_expert:
            n, k = tile % per_expert % n_tiles * (2 * ROWS), tile % per_expert // n_tiles * COLUMNS
            for row in range(start, end, DEPTH):
                mbarrier.wait(free.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, (2 * ROWS + COLUMNS) * DEPTH * SIZE)
                tma.async_copy_global_to_shared(dy_tiles, [row, n], bar, dy_s.index(2 * stage))
                tma.async_copy_global_to_shared(dy_tiles, [row, n + ROWS], bar, dy_s.index(2 * stage + 1))
                tma.async_copy_global_to_shared(x_tiles, [row, k], bar, x_s.index(stage))
                stage, phase = _after(stage, phase, STAGES)
            tile, turn = _take(counter, told, known, heard, turn)


@gluon.jit
def _multiply_columns(
    out_tiles, offsets, dy_s, x_s, staging, full, free, told, known, heard, tiles, n_tiles, K,
    W: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: 64 of a tile's 128 columns of dy, times 256 of x."""
    per_expert = n_tiles * ((K + COLUMNS - 1) // COLUMNS)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    tile, turn = _hear(told, known, heard, gl.to_tensor(0))
    while tile < tiles:
        e = tile // per_expert
        rows = gl.load(offsets + e + 1) - gl.load(offsets + e)
        n = tile % per_expert % n_tiles * (2 * ROWS) + W * ROWS
        k = tile % per_expert // n_tiles * COLUMNS
        left, right, stage, phase = _sum(dy_s, x_s, full, free, stage, phase, rows, W, DEPTH, STAGES, False, True)
        _keep(out_tiles, staging.index(W), left, [e, n, k])
        _keep(out_tiles, staging.index(W), right, [e, n, k + HALF])
        tile, turn = _hear(told, known, heard, turn)
    tma.store_wait(0)


@gluon.jit
def grouped_columns_hopper(
    dy, x, out_tiles, offsets, counter, experts, N, K, dy_m, x_m, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As ``grouped_columns``, for operands and outputs of 16 bits.

    Launched with four warps, which are the first warpgroup; the others are its own.
    """
    dtype: gl.constexpr = dy.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dy_s = gl.allocate_shared_memory(dtype, [2 * STAGES, DEPTH, ROWS], shared)
    x_s = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, COLUMNS], shared)
    staging = gl.allocate_shared_memory(out_tiles.dtype, [2, 1, ROWS, HALF], out_tiles.layout)
    told, known, heard = _open_line()
    full, free = _open_ring(STAGES)
    n_tiles = (N + 2 * ROWS - 1) // (2 * ROWS)
    tiles = experts * n_tiles * ((K + COLUMNS - 1) // COLUMNS)
    gl.warp_specialize(
        [
            (_multiply_columns, (
                out_tiles, offsets, dy_s, x_s, staging, full, free, told, known, heard,
                tiles, n_tiles, K, 0, DEPTH, STAGES,
            )),
            (_multiply_columns, (
                out_tiles, offsets, dy_s, x_s, staging, full, free, told, known, heard,
                tiles, n_tiles, K, 1, DEPTH, STAGES,
            )),
            (_feed_columns, (
                dy, x, offsets, counter, dy_s, x_s, full, free, told, known, heard,
                tiles, n_tiles, N, K, dy_m, x_m, DEPTH, STAGES,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
