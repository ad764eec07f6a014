"""Kernels of RMSNorm, rotary embedding and the write of new latents; one program a row. Deterministic."""

import triton
import triton.language as tl

from .quantize import encoded, largest, scale_of


@triton.jit
def normalised(value, weight, count, eps, DTYPE: tl.constexpr):
    """weight * value / rms(value): the quotient is rounded to DTYPE before the weight, as the torch module does."""
    scale = tl.rsqrt(tl.sum(value * value, 0) / count + eps)
    return (weight.to(tl.float32) * (value * scale).to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def rms_norm_rows(x, residual, weight, out, total, width, eps, x_m, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row of out = weight * norm(x), or of x + residual, whose sum goes to total."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < width
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + row * x_m + col, mask=mask, other=0.0)
    if ADD:
        other = tl.load(residual + row * width + col, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(dtype)
        tl.store(total + row * width + col, value, mask=mask)
    w = tl.load(weight + col, mask=mask, other=0.0)
    tl.store(out + row * width + col, normalised(value.to(tl.float32), w, width, eps, dtype), mask=mask)


@triton.jit
def turned(x, cos, sin, half, place, INTERLEAVE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of the rotated pairs at x, and their lanes; place: this token's row of cos and sin."""
    lane = tl.arange(0, HALF)
    mask = lane < half
    step = 2 if INTERLEAVE else 1
    first = tl.load(x + lane * step, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + (lane * 2 + 1 if INTERLEAVE else lane + half), mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + place + lane, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + place + lane, mask=mask, other=0.0).to(tl.float32)
    return (first * c - second * s).to(DTYPE), (second * c + first * s).to(DTYPE), lane, mask


@triton.jit
def rotate_rows(
    x, cos, sin, out, heads, tokens, half, x_b, x_h, x_t, cos_b, cos_t,
    INTERLEAVE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token and head of out [B, T, H, 2 half]."""
    h = tl.program_id(0)
    t = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    source = x + b * x_b + h.to(tl.int64) * x_h + t.to(tl.int64) * x_t
    place = b * cos_b + t.to(tl.int64) * cos_t
    first, second, lane, mask = turned(source, cos, sin, half, place, INTERLEAVE, HALF, out.dtype.element_ty)
    target = out + ((b * tokens + t) * heads + h) * 2 * half + lane
    tl.store(target, first, mask=mask)
    tl.store(target + half, second, mask=mask)


@triton.jit
def write_row(
    source, weight, cos, sin, slot, latent, rope, scale, rank, half, capacity, eps, floor, place, c_s, r_s, s_s, s_g,
    INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """The token at source: its normalised latent and rotated key to slot; place: its row of cos and sin.

    CODED: the latent as E4M3 codes, with a scale for each GROUP channels.
    """
    inside = (slot >= 0) & (slot < capacity)
    dtype: tl.constexpr = source.dtype.element_ty
    col = tl.arange(0, BLOCK)
    mask = col < rank
    value = tl.load(source + col, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=mask, other=0.0)
    result = normalised(value, w, rank, eps, dtype)
    if CODED:
        wide = tl.reshape(tl.where(mask, result, 0.0).to(tl.float32), (BLOCK // GROUP, GROUP))
        group = tl.arange(0, BLOCK // GROUP)
        channel = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        step = scale_of(largest(wide, 1), floor, False)
        tl.store(scale + slot * s_s + group * s_g, step, mask=(group * GROUP < rank) & inside)
        tl.store(latent + slot * c_s + channel, encoded(wide, step[:, None]), mask=(channel < rank) & inside)
    else:
        tl.store(latent + slot * c_s + col, result.to(latent.dtype.element_ty), mask=mask & inside)
    first, second, lane, live = turned(source + rank, cos, sin, half, place, INTERLEAVE, HALF, dtype)
    target = rope + slot * r_s + lane
    tl.store(target, first.to(rope.dtype.element_ty), mask=live & inside)
    tl.store(target + half, second.to(rope.dtype.element_ty), mask=live & inside)


@triton.jit(do_not_specialize=["capacity"])
def write_rows(
    compressed, weight, cos, sin, slots, latent, rope, scale, rank, half, eps, floor,
    x_b, x_t, cos_b, cos_t, slot_b, slot_t, c_b, c_s, r_b, r_s, s_b, s_s, s_g, capacity,
    INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """One new token: its normalised latent and rotated key into the slot of the cache that slots names."""
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    write_row(
        compressed + b * x_b + t * x_t, weight, cos, sin, tl.load(slots + b * slot_b + t * slot_t).to(tl.int64),
        latent + b * c_b, rope + b * r_b, scale + b * s_b if CODED else None, rank, half, capacity, eps, floor,
        b * cos_b + t * cos_t, c_s, r_s, s_s, s_g, INTERLEAVE, BLOCK, HALF, GROUP, CODED,
    )  # fmt: skip
