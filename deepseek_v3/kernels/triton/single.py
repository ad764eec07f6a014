"""Kernels of a decode step of a single token: matrix times vector, bound by reading the matrix.

D hidden, F expert width, K experts a token, H heads, C kv_lora_rank, V v_head_dim. A program owns a few rows of the
matrix and walks along them, so that many small programs keep the memory busy to the end. A norm in front costs no
launch: its gain is applied on the way, the sum of squares is formed on the way, and the quotient follows at the end.
Deterministic: each number is summed by one program in one order.
"""

import triton
import triton.language as tl

from .norm import normalised, turned, write_row


@triton.jit
def stretch(x, gain, k, depth, NORM: tl.constexpr):
    """x[k] in float32 as a row [1, BLOCK_K], and its squares; NORM: x[k] * gain[k] then."""
    inside = (k < depth)[None, :]
    value = tl.load(x + k[None, :], mask=inside, other=0.0).to(tl.float32)
    squares = value * value
    if NORM:
        value *= tl.load(gain + k[None, :], mask=inside, other=0.0).to(tl.float32)
    return value, squares


@triton.jit
def weights(w, row, rows, w_n, k, depth):
    """w[row, k] in float32."""
    mask = (row < rows)[:, None] & (k < depth)[None, :]
    return tl.load(w + row.to(tl.int64)[:, None] * w_n + k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def product(
    x, gain, w, up, row, rows, w_n, depth, eps,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of w times x, or times norm(x), float32; SWIGLU: silu of that times the rows of up times the same."""
    first = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        value, square = stretch(x, gain, k, depth, NORM)
        first += weights(w, row, rows, w_n, k, depth) * value
        if SWIGLU:
            second += weights(up, row, rows, w_n, k, depth) * value
        if NORM:
            squares += square
    result = tl.sum(first, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / depth + eps)
        result *= scale
    if SWIGLU:
        result = result * tl.sigmoid(result) * (tl.sum(second, 1) * scale)
    return result


@triton.jit
def single_products(
    gain, w, second, x, out, residual, rows, more, depth, eps, w_n, second_n,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = w [rows, depth] times x [depth], behind it second [more, depth] times x; NORM: of norm(x). SWIGLU: silu of
    the first times the second instead. ADD: plus residual."""
    lane = tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_N)
    pid = tl.program_id(0)
    if SWIGLU or pid < tiles:
        row = pid * BLOCK_N + lane
        count = rows
        place = row
        result = product(x, gain, w, second, row, rows, w_n, depth, eps, NORM, SWIGLU, BLOCK_N, BLOCK_K)
    else:
        row = (pid - tiles) * BLOCK_N + lane
        count = more
        place = rows + row
        result = product(x, gain, second, second, row, more, second_n, depth, eps, NORM, False, BLOCK_N, BLOCK_K)
    dtype: tl.constexpr = out.dtype.element_ty
    if ADD:
        result = result.to(dtype).to(tl.float32)
        result += tl.load(residual + place, mask=row < count, other=0.0).to(tl.float32)
    tl.store(out + place, result.to(dtype), mask=row < count)


@triton.jit
def single_scores(
    gain, w, x, out, normed, rows, depth, eps, w_n, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """normed = norm(x) [depth], rounded as the module rounds it, and out = w [rows, depth] times that."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, WHOLE)
    inside = k < depth
    dtype: tl.constexpr = x.dtype.element_ty
    matrix = weights(w, row, rows, w_n, k, depth)
    value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    result = normalised(value, tl.load(gain + k, mask=inside, other=0.0), depth, eps, dtype)
    tl.store(out + row, tl.sum(matrix * result.to(tl.float32)[None, :], 1), mask=row < rows)
    if tl.program_id(0) == 0:
        tl.store(normed + k, result, mask=inside)


@triton.jit(do_not_specialize=["capacity"])
def single_query(
    gain, w, weight, low, out, cos, sin, slots, latent, rope, scale,
    rows, depth, low_eps, w_n, rank, half, eps, floor, c_s, r_s, s_s, s_g, capacity,
    INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = w [rows, depth] times norm(low); what follows low in memory, latent and key, goes into the cache."""
    pid = tl.program_id(0)
    if pid == 0:
        write_row(
            low + depth, weight, cos, sin, tl.load(slots).to(tl.int64), latent, rope, scale, rank, half, capacity,
            eps, floor, 0, c_s, r_s, s_s, s_g, INTERLEAVE, BLOCK, HALF, GROUP, CODED,
        )  # fmt: skip
    else:
        row = (pid - 1) * BLOCK_N + tl.arange(0, BLOCK_N)
        result = product(low, gain, w, w, row, rows, w_n, depth, low_eps, True, False, BLOCK_N, BLOCK_K)
        tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def single_absorb(
    w, q, cos, sin, latent, rope, nope, rank, half, q_h, w_h, w_n,
    INTERLEAVE: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One head's query q[h], not rotated yet: latent[h] [rank] = q[h, :nope] times w[h] [nope, rank], and what follows
    in q[h], turned, to rope[h] [2 half]."""
    h = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = latent.dtype.element_ty
    n = tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    matrix = weights(w + h * w_h, n, nope, w_n, col, rank)
    vector = tl.load(q + h * q_h + n, mask=n < nope, other=0.0).to(tl.float32)
    tl.store(latent + h * rank + col, tl.sum(matrix * vector[:, None], 0).to(dtype), mask=col < rank)
    if tl.program_id(1) == 0:
        first, second, lane, live = turned(q + h * q_h + nope, cos, sin, half, 0, INTERLEAVE, HALF, dtype)
        tl.store(rope + h * 2 * half + lane, first, mask=live)
        tl.store(rope + h * 2 * half + half + lane, second, mask=live)


@triton.jit(do_not_specialize=["splits"])
def single_values(
    w, partial, partial_lse, out, rank, values, first, w_h, w_v, splits,
    C: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One head: its splits joined, partial [H, splits, rank], and as many rows of w[h] as there are values, from first
    on, times that: out [H, values]."""
    h = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    every = tl.arange(0, SPLITS)
    each = tl.load(partial_lse + h * splits + every, mask=every < splits, other=float("-inf"))
    top = tl.max(each, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(each - base), 0)
    col = tl.arange(0, C)
    mixed = tl.zeros([C], tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        split = s0 + tl.arange(0, BLOCK_S)
        own = tl.load(partial_lse + h * splits + split, mask=split < splits, other=float("-inf"))
        part = tl.load(
            partial + (h * splits + split[:, None]) * rank + col[None, :],
            mask=(split < splits)[:, None] & (col < rank)[None, :], other=0.0,
        )  # fmt: skip
        mixed += tl.sum(part.to(tl.float32) * tl.exp(own - base)[:, None], 0)
    mixed = (mixed / tl.where(total == 0.0, 1.0, total)).to(dtype).to(tl.float32)
    row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    matrix = weights(w + h * w_h + tl.cast(first, tl.int64) * w_v, row, values, w_v, col, rank)
    tl.store(out + h * values + row, tl.sum(matrix * mixed[None, :], 1).to(dtype), mask=row < values)


@triton.jit
def single_up(
    w, shared_gate, shared_up, x, index, out, experts, width, depth, shared, pairs, w_e, w_n, shared_n,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of x for each of the token's experts, out [pairs, width], and behind them for
    the shared experts, [shared]. w [E, 2 width, depth]; an expert that lives elsewhere is left out."""
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    own = tl.cdiv(shared, BLOCK_N)
    tiles = tl.cdiv(width, BLOCK_N)
    row = pid * BLOCK_N + lane
    if pid < own:
        result = product(
            x, x, shared_gate, shared_up, row, shared, shared_n, depth, 0.0, False, True, BLOCK_N, BLOCK_K
        )
        tl.store(out + pairs * width + row, result.to(out.dtype.element_ty), mask=row < shared)
    else:
        pair = (pid - own) // tiles
        row = (pid - own) % tiles * BLOCK_N + lane
        e = tl.load(index + pair)
        if e < experts:
            gate = w + e.to(tl.int64) * w_e
            up = gate + tl.cast(width, tl.int64) * w_n
            result = product(x, x, gate, up, row, width, w_n, depth, 0.0, False, True, BLOCK_N, BLOCK_K)
            tl.store(out + pair * width + row, result.to(out.dtype.element_ty), mask=row < width)


@triton.jit
def single_down(
    w, shared_down, act, index, share, residual, out, experts, rows, width, shared, w_e, w_n, shared_n,
    PAIRS: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows] = sum of share[p] * (w[expert p] times act[p]), plus the shared experts', plus residual (ADD)."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for p in tl.static_range(PAIRS):
        e = tl.load(index + p)
        if e < experts:
            factor = tl.load(share + p).to(tl.float32)
            for k0 in range(0, width, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                value, _ = stretch(act + p * width, act, k, width, False)
                acc += weights(w + e.to(tl.int64) * w_e, row, rows, w_n, k, width) * (value * factor)
    for k0 in range(0, shared, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        value, _ = stretch(act + PAIRS * width, act, k, shared, False)
        acc += weights(shared_down, row, rows, shared_n, k, shared) * value
    result = tl.sum(acc, 1)
    if ADD:
        result += tl.load(residual + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)
