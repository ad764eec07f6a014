"""Dense FP8 product with fine-grained scales, and the FP8 weight gradient of experts.

M rows, N columns, K reduced; a scale for 128 reduced elements. Every 128 products leave the tensor cores, which keep
about 14 bits of a sum, and are scaled and added in float32 (DeepSeek-V3 report, section 3.3.2). Deterministic.
"""

import triton
import triton.language as tl


@triton.jit
def fp8_matmul(
    a, b, out, a_tiles, b_tiles, a_scale, b_scale,
    M, N, K, a_m, b_n, out_m, as_m, as_k, bs_n, bs_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
    TMA: tl.constexpr, BY_ROW: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out = a @ b.T for codes a [M, K], b [N, K]. BY_ROW: b has a scale a row, else one for 128 rows. ADD: +=."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (BAND * n_tiles) * BAND
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - band, BAND)
    inside = pid % (BAND * n_tiles)
    m0 = (band + inside % height) * BLOCK_M
    n0 = inside // height * BLOCK_N
    m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, 128)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for g in range(tl.cdiv(K, 128)):
        sa = tl.load(a_scale + m * as_m + tl.cast(g, tl.int64) * as_k, mask=m < M, other=0.0)
        if TMA:
            left = a_tiles.load([m0, g * 128])
            right = b_tiles.load([n0, g * 128])
        else:
            inner = (g * 128 + k < K)[None, :]
            left = tl.load(a + m[:, None] * a_m + g * 128 + k[None, :], mask=(m < M)[:, None] & inner, other=0.0)
            right = tl.load(b + n[:, None] * b_n + g * 128 + k[None, :], mask=(n < N)[:, None] & inner, other=0.0)
        if BY_ROW:
            sb = tl.load(b_scale + n * bs_n + tl.cast(g, tl.int64) * bs_k, mask=n < N, other=0.0)
            acc += tl.dot(left, right.T) * sa[:, None] * sb[None, :]
        else:
            sb = tl.load(b_scale + (n0 // 128).to(tl.int64) * bs_n + tl.cast(g, tl.int64) * bs_k)
            acc += tl.dot(left, right.T) * (sa * sb)[:, None]
    place = out + m[:, None] * out_m + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def fp8_grouped_columns(
    dy, x, out, dy_tiles, x_tiles, out_tiles, dy_scale, x_scale, offsets,
    N, K, experts, dy_n, x_k, ds_n, ds_g, xs_k, xs_g,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWEEP: tl.constexpr, TMA: tl.constexpr,
    TMA_OUT: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the expert's groups of 128 rows of dy[:, group] @ x[:, group].T: [E, N, K].

    Few groups an expert make a tile short work: a program sweeps over SWEEP tiles beside one another.
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    n0 = tl.program_id(0) % n_tiles * BLOCK_N
    e = tl.program_id(1)
    i = tl.arange(0, BLOCK_E)
    low = tl.load(offsets + i, mask=i < experts, other=0)
    high = tl.load(offsets + i + 1, mask=i < experts, other=0)
    groups = (high - low + 127) // 128
    first = tl.sum(tl.where(i < e, groups, 0), 0)
    count = tl.sum(tl.where(i == e, groups, 0), 0)
    n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = tl.arange(0, 128)
    for turn in range(SWEEP):
        k0 = (tl.program_id(0) // n_tiles * SWEEP + turn) * BLOCK_K
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for g in range(first, first + count):
            group = tl.cast(g, tl.int64)
            sa = tl.load(dy_scale + n * ds_n + group * ds_g, mask=n < N, other=0.0)
            sb = tl.load(x_scale + k * xs_k + group * xs_g, mask=k < K, other=0.0)
            if TMA:
                left = dy_tiles.load([n0, g * 128])
                right = x_tiles.load([k0, g * 128])
            else:
                place = group * 128 + m
                left = tl.load(dy + n[:, None] * dy_n + place[None, :], mask=(n < N)[:, None], other=0.0)
                right = tl.load(x + k[:, None] * x_k + place[None, :], mask=(k < K)[:, None], other=0.0)
            acc += tl.dot(left, right.T) * sa[:, None] * sb[None, :]
        if TMA_OUT:
            out_tiles.store([e * N + n0, k0], acc.to(out.dtype.element_ty))
        else:
            place = out + e.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
            tl.store(place, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
