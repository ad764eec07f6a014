"""Grouped matrix products over tokens sorted by expert; where each expert's rows begin is read on the device.

P sorted pairs (rows), E experts, N output columns, K reduced columns. The grid is the largest number of tiles that
any routing of P rows can need; a program past the real number leaves at once, so no size travels to the host.
Deterministic: each output element is summed by one program in one order.
"""

import triton
import triton.language as tl


@triton.jit
def expert_of(offsets, piece, each, experts, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of a piece, the expert's first row and end, its first piece: ``each`` pieces for every ROWS rows.

    The expert is ``experts`` or more, and without rows, where there are fewer pieces.
    """
    i = tl.arange(0, BLOCK_E)
    low = tl.load(offsets + i, mask=i < experts, other=0)
    high = tl.load(offsets + i + 1, mask=i < experts, other=0)
    tiles = (high - low + ROWS - 1) // ROWS
    # The experts before this one and their tiles in one sum: what is added up across warps waits for all of them.
    before = tl.sum(tl.where(tl.cumsum(tiles, 0) * each <= piece, (1 << 32) + tiles.to(tl.int64), 0), 0)
    e = (before >> 32).to(tl.int32)
    start = tl.load(offsets + e, mask=e < experts, other=0)
    end = tl.load(offsets + e + 1, mask=e < experts, other=0)
    return e, start, end, (before & 0xFFFFFFFF).to(tl.int32) * each


@triton.jit
def locate(
    offsets, pid, n_tiles, experts,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program number -> (expert, its first row, its end, row tile, column tile); expert >= E: nothing to do.

    Row tiles of one expert that share weights are neighbours, in bands of GROUP_M so that the rows stay in the L2.
    """
    e, start, end, first = expert_of(offsets, pid, n_tiles, experts, BLOCK_M, BLOCK_E)
    local = pid - first
    band = local // (GROUP_M * n_tiles) * GROUP_M
    height = tl.maximum(tl.minimum((end - start + BLOCK_M - 1) // BLOCK_M - band, GROUP_M), 1)
    inside = local % (GROUP_M * n_tiles)
    return e, start, end, band + inside % height, inside // height


@triton.jit
def grouped_rows(
    x, w, out, offsets, x_tiles, w_tiles, x_scale, w_scale,
    experts, N, K, x_m, w_e, w_n, w_k, out_m, xs_m, xs_k, ws_e, ws_n, ws_k,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m] = x[m] @ w[e].T for the rows m of expert e; TRANSPOSED: @ w[e]. FP8: scales 1 x 128 and 128 x 128.

    Else x may be narrower than w, and is widened to it.
    """
    e, start, end, m_tile, n_tile = locate(
        offsets, tl.program_id(0), tl.cdiv(N, BLOCK_N), experts, BLOCK_E, BLOCK_M, GROUP_M
    )
    if e >= experts:
        return
    row0 = start + m_tile * BLOCK_M
    n0 = n_tile * BLOCK_N
    row = row0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live = row < end
    xp = x + row.to(tl.int64)[:, None] * x_m
    wp = w + e.to(tl.int64) * w_e + n.to(tl.int64)[:, None] * w_n
    if TRANSPOSED:
        wp = w + e.to(tl.int64) * w_e + n.to(tl.int64)[None, :] * w_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if TMA:
            a = x_tiles.load([row0, k0])
            if TRANSPOSED:
                b = w_tiles.load([e, k0, n0]).reshape(BLOCK_K, BLOCK_N)
            else:
                b = w_tiles.load([e, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
        else:
            kk = (k0 + k).to(tl.int64)
            a = tl.load(xp + kk[None, :], mask=live[:, None] & (kk < K)[None, :], other=0.0)
            if TRANSPOSED:
                b = tl.load(wp + kk[:, None] * w_k, mask=(n < N)[None, :] & (kk < K)[:, None], other=0.0)
            else:
                b = tl.load(wp + kk[None, :] * w_k, mask=(n < N)[:, None] & (kk < K)[None, :], other=0.0).T
        if FP8:
            # The tensor cores keep about 14 bits of a sum: each 128 products are added in float32 outside them.
            group = tl.cast(k0 // 128, tl.int64)
            sa = tl.load(x_scale + row.to(tl.int64) * xs_m + group * xs_k, mask=live, other=0.0)
            sb = tl.load(w_scale + e.to(tl.int64) * ws_e + (n0 // 128).to(tl.int64) * ws_n + group * ws_k)
            acc += tl.dot(a, b) * (sa * sb)[:, None]
        else:
            acc = tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)
    place = out + row.to(tl.int64)[:, None] * out_m + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit
def grouped_columns(
    dy, x, out, offsets, N, K, dy_m, x_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] = dy[rows of e].T @ x[rows of e]: [E, N, K]; an expert without rows gets zeros. Where dy and x differ in
    dtype, both are widened to float32."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    n0 = tl.program_id(0) % n_tiles * BLOCK_N
    k0 = tl.program_id(0) // n_tiles * BLOCK_K
    e = tl.program_id(1)
    start = tl.load(offsets + e)
    end = tl.load(offsets + e + 1)
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if TMA:
        # Descriptors that end with the expert: rows of the next one arrive as zeros, without a mask.
        dy_tiles = tl.make_tensor_descriptor(dy, [tl.maximum(end, 1), N], [dy_m, 1], [BLOCK_M, BLOCK_N])
        x_tiles = tl.make_tensor_descriptor(x, [tl.maximum(end, 1), K], [x_m, 1], [BLOCK_M, BLOCK_K])
    for m0 in range(start, end, BLOCK_M):
        if TMA:
            a = dy_tiles.load([m0, n0])
            b = x_tiles.load([m0, k0])
        else:
            row = m0 + tl.arange(0, BLOCK_M)
            live = (row < end)[:, None]
            a = tl.load(dy + row.to(tl.int64)[:, None] * dy_m + n[None, :], mask=live & (n < N)[None, :], other=0.0)
            b = tl.load(x + row.to(tl.int64)[:, None] * x_m + k[None, :], mask=live & (k < K)[None, :], other=0.0)
        if a.dtype != b.dtype:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    place = out + e.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def few_rows(
    x, source, w, up, out, row, live, n_tile, N, K, x_m, w_n, out_m, x_scale, w_scale, up_scale, xs_m, xs_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWIGLU: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out[row] = x[source] @ w.T, w [N, K]; SWIGLU: silu of that times x[source] @ up.T."""
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    xp = x + source.to(tl.int64)[None, :] * x_m
    wp = w + n.to(tl.int64)[:, None] * w_n
    second_wp = up + n.to(tl.int64)[:, None] * w_n
    first = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        kk = k0 + k
        mask = (n < N)[:, None] & (kk < K)[None, :]
        b = tl.load(xp + kk[:, None], mask=live[None, :] & (kk < K)[:, None], other=0.0)
        a = tl.load(wp + kk[None, :], mask=mask, other=0.0)
        if FP8:
            group = tl.cast(k0 // 128, tl.int64)
            sb = tl.load(x_scale + source.to(tl.int64) * xs_m + group * xs_k, mask=live, other=0.0)
            first += tl.dot(a, b) * (sb * tl.load(w_scale + group))[None, :]
        else:
            first = tl.dot(a, b.to(a.dtype), first, input_precision=PRECISION)
        if SWIGLU:
            c = tl.load(second_wp + kk[None, :], mask=mask, other=0.0)
            if FP8:
                second += tl.dot(c, b) * (sb * tl.load(up_scale + group))[None, :]
            else:
                second = tl.dot(c, b, second, input_precision=PRECISION)
    if SWIGLU:
        first = first * tl.sigmoid(first) * second
    place = out + row.to(tl.int64)[None, :] * out_m + n[:, None]
    tl.store(place, first.to(out.dtype.element_ty), mask=live[None, :] & (n < N)[:, None])


@triton.jit
def grouped_few(
    x, w, out, offsets, order, x_scale, w_scale,
    experts, N, K, top_k, x_m, w_e, w_n, out_m, xs_m, xs_k, ws_e, ws_n,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHER: tl.constexpr, SWIGLU: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A few rows an expert, bound by reading the weights: out[m] = x[m] @ w[e].T with the weights as tall operand.

    GATHER reads row order[m] // top_k of x. SWIGLU takes w as [2 N, K], gate rows first, and gives
    silu(gate) * up. FP8: codes in x and w, scales 1 x 128 and 128 x 128.
    """
    e, start, end, m_tile, n_tile = locate(
        offsets, tl.program_id(0), tl.cdiv(N, BLOCK_N), experts, BLOCK_E, BLOCK_M, 1
    )
    if e >= experts:
        return
    row = start + m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < end
    source = row
    if GATHER:
        source = tl.load(order + row, mask=live, other=0) // top_k
    own = w + e.to(tl.int64) * w_e
    scale = w_scale
    up_scale = w_scale
    if FP8:
        scale = w_scale + e.to(tl.int64) * ws_e + (n_tile * BLOCK_N // 128).to(tl.int64) * ws_n
        up_scale = scale + tl.cast(N // 128, tl.int64) * ws_n
    few_rows(
        x, source, own, own + N.to(tl.int64) * w_n, out, row, live, n_tile, N, K, x_m, w_n, out_m,
        x_scale, scale, up_scale, xs_m, xs_k, BLOCK_M, BLOCK_N, BLOCK_K, SWIGLU, FP8, PRECISION,
    )  # fmt: skip


@triton.jit
def grouped_step(
    x, w, out, offsets, order, shared, shared_up,
    experts, N, K, top_k, x_m, w_e, w_n, out_m, pairs, tokens, shared_n, shared_k, shared_first, shared_w_n,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHER: tl.constexpr, SWIGLU: tl.constexpr, SORTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `grouped_few`, and in the same launch the shared experts: rows from shared_first on of x, to those from
    `pairs` on of out, times `shared` and `shared_up` [shared_n, shared_k].

    SORTED: pairs sorted by expert, with offsets and order; else order holds each pair's expert, every pair is a tile
    of its own, and there is one token.
    """
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK_M)
    own_tiles = tl.cdiv(shared_n, BLOCK_N)
    of_shared = own_tiles * tl.cdiv(tokens, BLOCK_M)
    if pid < of_shared:
        token = pid // own_tiles * BLOCK_M + lane
        few_rows(
            x, shared_first + token, shared, shared_up, out, pairs + token, token < tokens, pid % own_tiles,
            shared_n, shared_k, x_m, shared_w_n, out_m, x, x, x, 0, 0,
            BLOCK_M, BLOCK_N, BLOCK_K, SWIGLU, False, PRECISION,
        )  # fmt: skip
    else:
        n_tiles = tl.cdiv(N, BLOCK_N)
        if SORTED:
            e, start, end, m_tile, n_tile = locate(offsets, pid - of_shared, n_tiles, experts, BLOCK_E, BLOCK_M, 1)
            row = start + m_tile * BLOCK_M + lane
        else:
            start = (pid - of_shared) // n_tiles
            n_tile = (pid - of_shared) % n_tiles
            e = tl.load(order + start).to(tl.int32)
            end = start + 1
            row = start + lane
        if e < experts:
            live = row < end
            source = row
            if GATHER:
                source = row * 0
                if SORTED:
                    source = tl.load(order + row, mask=live, other=0) // top_k
            own = w + e.to(tl.int64) * w_e
            few_rows(
                x, source, own, own + N.to(tl.int64) * w_n, out, row, live, n_tile, N, K, x_m, w_n, out_m,
                x, x, x, 0, 0, BLOCK_M, BLOCK_N, BLOCK_K, SWIGLU, False, PRECISION,
            )  # fmt: skip
