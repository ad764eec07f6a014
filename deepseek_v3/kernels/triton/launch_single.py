"""Launchers of a decode step of a single token."""

import torch

from ..reference.norm import AMAX_FLOOR
from .launch_mla import attend
from .launch_norm import of_cache
from .launch_permute import route
from .launch_step import absorb_queries
from .launching import Launcher, cdiv, next_power_of_2
from .single import single_down, single_products, single_query, single_up, single_values
from .tilings import SINGLE, SINGLE_SHALLOW, SINGLE_SWIGLU, Stretch

_products, _query, _values = Launcher(single_products), Launcher(single_query), Launcher(single_values)
_up, _down = Launcher(single_up), Launcher(single_down)


def blocks(tiling: Stretch, *widths: int) -> dict[str, int]:
    """Block sizes and options of a launch; no wider than the widest of `widths`."""
    columns = min(tiling.columns, max(16, next_power_of_2(max(widths))))
    return {"BLOCK_N": tiling.rows, "BLOCK_K": columns, "num_warps": tiling.warps}


def products(x, gain, eps, w, second, out, residual=None, swiglu=False, tiling=None):
    """Fill and return ``out`` with w x and behind it second x, or with silu(w x) * (second x), all of norm(x) where
    there is a gain; plus ``residual``, if any. x and out are dense, of as many numbers as the weights say."""
    rows, depth = w.shape
    more = 0 if swiglu or second is None else second.shape[0]
    tiling = tiling or (SINGLE_SWIGLU if swiglu else SINGLE)
    second = w if second is None else second
    programs = cdiv(rows, tiling.rows) + cdiv(more, tiling.rows)
    _products(
        (programs, 1, 1), (x, gain, w, second, out, residual),
        (rows, more, depth, eps, w.stride(0), second.stride(0)),
        NORM=gain is not None, SWIGLU=swiglu, ADD=residual is not None, **blocks(tiling, depth),
    )  # fmt: skip
    return out


def _write_and_query(low, gain, low_eps, w, weight, eps, cos, sin, slots, cache, interleave, query, tiling=None):
    """Write what follows ``low``'s first numbers to the cache; fill ``query`` with w norm(low), if there is one."""
    latent, rope, scale = cache
    tiling = tiling or SINGLE_SHALLOW
    strides, constants = of_cache(latent, rope, scale, interleave)
    depth = low.numel() - latent.shape[2] - rope.shape[2]
    rows = 0 if query is None else query.numel()
    _query(
        (1 + cdiv(rows, tiling.rows), 1, 1),
        (low, gain, w, query, weight, cos, sin, slots, latent, rope, scale),
        (rows, depth, low_eps, 0 if w is None else w.stride(0), latent.shape[2], rope.shape[2] // 2, eps, AMAX_FLOOR,
         strides[1], strides[3], *strides[5:]), (latent.shape[1],),
        **constants | blocks(tiling, depth),
    )  # fmt: skip


def _attended(partial, partial_lse, splits, weight, value):
    """Every head's values [H * V] from the splits over the latents."""
    _, heads, _, rank = partial.shape
    out = torch.empty(heads * value, dtype=weight.dtype, device=weight.device)
    w = weight.view(heads, -1, rank)[:, -value:]
    rows = min(32, next_power_of_2(value))
    _values(
        (heads, cdiv(value, rows), 1), (partial, partial_lse, w, out), (rank, value, *w.stride()[:2]), (splits,),
        C=next_power_of_2(rank), BLOCK_S=16, SPLITS=next_power_of_2(splits), BLOCK_V=rows, num_warps=4,
    )  # fmt: skip
    return out


def attention(
    x, gain, eps, q_a, q_gain, q_eps, kv_a, kv_gain, kv_eps, q_b, kv_b, o, heads, latent, rope, scale,
    cos, sin, slots, softmax_scale, lengths, starts, window, interleave,
):  # fmt: skip
    """See ``deepseek_v3.kernels.single_attention``."""
    first = q_b if q_a is None else q_a
    value = o.shape[1] // heads
    low = torch.empty(first.shape[0] + kv_a.shape[0], dtype=x.dtype, device=x.device)
    products(x, gain, eps, first, kv_a, low)
    query = low
    if q_a is not None:
        query = torch.empty(q_b.shape[0], dtype=x.dtype, device=x.device)
    where = (kv_gain, kv_eps, cos, sin, slots, (latent, rope, scale), interleave)
    _write_and_query(low, q_gain, q_eps, q_b, *where, None if q_a is None else query)
    query = query[: q_b.shape[0]].view(1, 1, heads, -1)
    absorbed = absorb_queries(query, kv_b, cos, sin, interleave)
    parts = attend(*absorbed, latent, rope, softmax_scale, lengths, starts, scale, window)
    return products(_attended(*parts, kv_b, value), None, 0.0, o, None, torch.empty_like(x), x)


def mlp(x, gain, eps, gate, up, down):
    """See ``deepseek_v3.kernels.single_mlp``."""
    act = torch.empty(gate.shape[0], dtype=x.dtype, device=x.device)
    products(x, gain, eps, gate, up, act, swiglu=True)
    return products(act, None, 0.0, down, None, torch.empty_like(x), x)


def chosen_experts(x, gain, eps, w, down, index, share, shared=None, residual=None, tilings=(None, None)):
    """The sum of the token's experts, index [K], times share [K]; of norm(x) where there is a gain; plus the shared
    experts' (gate, up, down) and the residual, if any. As x."""
    width, pairs = down.shape[2], index.numel()
    gate, up, shared_down = (w[0], w[0], down[0]) if shared is None else shared
    wide = 0 if shared is None else gate.shape[0]
    act = torch.empty(pairs * width + wide, dtype=x.dtype, device=x.device)
    first, second = tilings[0] or SINGLE_SWIGLU, tilings[1] or SINGLE
    _up(
        (cdiv(wide, first.rows) + pairs * cdiv(width, first.rows), 1, 1), (x, gain, w, gate, up, index, act),
        (w.shape[0], width, w.shape[2], wide, pairs, eps, w.stride(0), w.stride(1), gate.stride(0)),
        NORM=gain is not None, **blocks(first, w.shape[2]),
    )  # fmt: skip
    out = torch.empty_like(x)
    _down(
        (cdiv(down.shape[1], second.rows), 1, 1), (act, down, shared_down, index, share, residual, out),
        (down.shape[0], down.shape[1], width, wide, down.stride(0), down.stride(1), shared_down.stride(0)),
        PAIRS=pairs, ADD=residual is not None, **blocks(second, width, wide),
    )  # fmt: skip
    return out


def experts(
    x, gain, eps, router, bias, groups, kept, top_k, normalise, scaling, gate_up, down, shared_gate, shared_up,
    shared_down,
):  # fmt: skip
    """See ``deepseek_v3.kernels.single_experts``."""
    logits = torch.empty(1, router.shape[0], dtype=torch.float32, device=x.device)
    products(x, gain, eps, router, None, logits)
    index, share = route(logits, bias, groups, kept, top_k, normalise, scaling)
    return chosen_experts(x, gain, eps, gate_up, down, index, share, (shared_gate, shared_up, shared_down), x)
