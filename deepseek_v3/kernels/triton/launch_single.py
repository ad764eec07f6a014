"""Launches of a decode step of a single token, each bound once to what stays from step to step."""

import torch
import triton

from ..reference.norm import AMAX_FLOOR
from ..tuning import active as tuning
from .launch_mla import NO_WINDOW, mla_decode, plan, scratch, split_kernel
from .launch_norm import of_cache
from .launch_permute import choice, choose
from .launching import Bound, Launcher, cdiv, next_power_of_2
from .single import (
    single_absorb,
    single_down,
    single_products,
    single_query,
    single_scores,
    single_up,
    single_values,
)
from .tilings import SINGLE, SINGLE_FEW, SINGLE_SHALLOW, SINGLE_SWIGLU, Stretch

_products, _query, _absorb, _values = map(Launcher, (single_products, single_query, single_absorb, single_values))
_scores, _up, _down = map(Launcher, (single_scores, single_up, single_down))


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether each lies where a kernel may read 16 bytes at once, as everything freshly allocated does."""
    return not any(x is not None and x.data_ptr() % 16 for x in tensors)


def _whole(size: int) -> int:
    """The least size from this one up of whole 16 bytes, whatever the dtype."""
    return -(-size // 8) * 8


def _blocks(tiling: Stretch, *widths: int) -> dict[str, int]:
    """Block sizes and options of a launch; no wider than the widest of `widths`."""
    columns = min(tiling.columns, max(16, next_power_of_2(max(widths))))
    return {"BLOCK_N": tiling.rows, "BLOCK_K": columns, "num_warps": tiling.warps}


class Products:
    """w x and behind it second x, or silu(w x) * (second x); of norm(x) where there is a gain; plus a residual."""

    def __init__(self, w, second=None, gain=None, eps=0.0, swiglu=False, add=False, tiling=None):
        tiling = tiling or (SINGLE_SWIGLU if swiglu else SINGLE)
        rows, depth = w.shape
        more = 0 if swiglu or second is None else second.shape[0]
        second = w if second is None else second
        self.size, self._grid = rows + more, (cdiv(rows, tiling.rows) + cdiv(more, tiling.rows), 1, 1)
        numbers = (rows, more, depth, eps, w.stride(0), second.stride(0))
        flags = {"NORM": gain is not None, "SWIGLU": swiglu, "ADD": add}
        self._launch = Bound(_products, (gain, w, second), numbers, **flags, **_blocks(tiling, depth))

    def __call__(self, x, out, residual=None, sure=True):
        """Fill and return ``out``; x and it are dense, of as many numbers as the weights say."""
        self._launch(self._grid, (x, out, residual), (), sure)
        return out


class MLP:
    """See ``deepseek_v3.kernels.SingleMLP``."""

    def __init__(self, norm, gate, up, down):
        self._up, self._down = Products(gate, up, norm.weight, norm.eps, swiglu=True), Products(down, add=True)

    def __call__(self, x):
        sure = aligned(x)
        act = self._up(x, torch.empty(self._up.size, dtype=x.dtype, device=x.device), sure=sure)
        return self._down(act, torch.empty_like(x), x, sure)


class ChosenExperts:
    """The sum of a token's experts, each times its share, plus the shared experts' (gate, up, down) and the residual,
    if any."""

    def __init__(self, gate_up, down, top_k, shared=None, tilings=(None, None)):
        first, second = tilings[0] or SINGLE_SWIGLU, tilings[1] or SINGLE_FEW
        experts, rows, width = down.shape
        gate, up, shared_down = (gate_up[0], gate_up[0], down[0]) if shared is None else shared
        wide, depth = 0 if shared is None else gate.shape[0], gate_up.shape[2]
        self.size = top_k * width + wide
        self._grids = (cdiv(wide, first.rows) + top_k * cdiv(width, first.rows), 1, 1), (cdiv(rows, second.rows), 1, 1)
        numbers = (experts, width, depth, wide, top_k, *gate_up.stride()[:2], gate.stride(0))
        self._up = Bound(_up, (gate_up, gate, up), numbers, **_blocks(first, depth))
        numbers = (experts, rows, width, wide, *down.stride()[:2], shared_down.stride(0))
        options = {"PAIRS": top_k, "ADD": shared is not None, **_blocks(second, width, wide)}
        self._down = Bound(_down, (down, shared_down), numbers, **options)

    def up(self, x, index, act, sure=True):
        """Fill ``act`` [size] with what goes into the down projections."""
        self._up(self._grids[0], (x, index, act), (), sure)

    def down(self, act, index, share, residual, out, sure=True):
        """Fill and return ``out`` [D]."""
        self._down(self._grids[1], (act, index, share, residual, out), (), sure)
        return out

    def __call__(self, x, index, share, residual=None, sure=True):
        """As x, [1, D] or [1, 1, D]; index and share [1, K]."""
        act = torch.empty(self.size, dtype=x.dtype, device=x.device)
        self.up(x, index, act, sure)
        return self.down(act, index, share, residual, torch.empty_like(x), sure)


class Experts:
    """See ``deepseek_v3.kernels.SingleExperts``."""

    def __init__(self, norm, router, gate_up, down, shared):
        weight, self._bias, *rest = router
        rows, depth = weight.shape
        self._rooms = [_whole(rows), _whole(router.top_k), _whole(router.top_k)]
        numbers, self._grid = (rows, depth, norm.eps, weight.stride(0)), (rows, 1, 1)
        self._score = Bound(
            _scores, (norm.weight, weight), numbers, BLOCK_N=1, WHOLE=next_power_of_2(depth), num_warps=8
        )
        numbers, constants = choice(rows, rows, self._bias, *rest)
        self._choose = Bound(choose, (), numbers, **constants)
        self._experts = ChosenExperts(gate_up, down, router.top_k, shared)

    def __call__(self, x):
        sure = aligned(x, self._bias)
        room = torch.empty(sum(self._rooms), dtype=torch.float32, device=x.device)
        logits, share, index = room.split_with_sizes(self._rooms)
        index = index.view(torch.int32)
        normed = torch.empty_like(x)
        self._score(self._grid, (x, logits, normed), (), sure)
        self._choose((1, 1, 1), (logits, self._bias, index, share), (), sure)
        return self._experts(normed, index, share, x, sure)


class _OverCache:
    """An attention's launches over one layout of the cache; those over its length by how many tiles that is."""

    def __init__(self, owner, latent, rope, scale):
        strides, constants = of_cache(latent, rope, scale, owner.interleave)
        rank, turning = latent.shape[2], rope.shape[2]
        heads, depth, row = owner.heads, owner.depth, owner.kv_b.stride(0)
        rows = 0 if owner.low is None else owner.q_b.shape[0]
        gain, low_eps = (owner.kv_norm.weight, 0.0) if owner.low is None else owner.low
        numbers = (rows, depth, low_eps, owner.q_b.stride(0), rank, turning // 2, owner.kv_norm.eps, AMAX_FLOOR,
                   strides[1], strides[3], *strides[5:])  # fmt: skip
        self.query_grid = (1 + cdiv(rows, SINGLE_SHALLOW.rows), 1, 1)
        options = constants | _blocks(SINGLE_SHALLOW, depth)
        self.query = Bound(_query, (gain, owner.q_b, owner.kv_norm.weight), numbers, **options)
        nope = owner.q_b.shape[0] // heads - turning
        columns = min(64, next_power_of_2(rank))
        numbers = (nope, rank, turning // 2, nope + turning, owner.kv_rows * row, row)
        self.absorb_grid = (heads, cdiv(rank, columns), 1)
        blocks = {"BLOCK_N": next_power_of_2(nope), "BLOCK_C": columns}
        turn = {"INTERLEAVE": owner.interleave, "HALF": next_power_of_2(turning // 2)}
        self.absorb = Bound(_absorb, (owner.kv_b,), numbers, **turn, **blocks, num_warps=2)
        # What follows one another in memory: the projections' results, the queries, and every head's values.
        sizes = (owner.size, rows, heads * rank, heads * turning, heads * owner.width)
        self.rooms = [_whole(size) for size in sizes]
        self.lengths, self.tilings = {}, {}


class Attention:
    """See ``deepseek_v3.kernels.SingleAttention``."""

    def __init__(self, weights, heads, softmax_scale, interleave):
        norm, q_a, self.low, kv_a, self.kv_norm, self.q_b, self.kv_b, o = weights
        self.heads, self.interleave, self._scale = heads, interleave, softmax_scale
        first = self.q_b if q_a is None else q_a
        self._project = Products(first, kv_a, norm.weight, norm.eps, tiling=SINGLE_FEW)
        self.size, self.depth = self._project.size, self._project.size - kv_a.shape[0]
        self.kv_rows, self.width = self.kv_b.shape[0] // heads, o.shape[1] // heads
        self._output = Products(o, add=True)
        self._rows = min(64, next_power_of_2(self.width))
        self._layouts, self._joins = {}, {}

    def __call__(self, x, latent, rope, scale, used, cos, sin, slots, lengths, starts, window):
        sure = aligned(x, latent, rope, scale, cos, sin, slots, lengths, starts)
        layout = (latent.dtype, latent.stride(1), rope.stride(1), cos.dtype, slots.dtype)
        kinds = (*layout, None if lengths is None else lengths.dtype, None if starts is None else starts.dtype)
        bound = self._layouts.get(kinds)
        if bound is None:
            bound = self._layouts[kinds] = _OverCache(self, latent, rope, scale)
        room = torch.empty(sum(bound.rooms), dtype=x.dtype, device=x.device)
        low, query, q_latent, q_rope, values = room.split_with_sizes(bound.rooms)
        self._project(x, low, sure=sure)
        written = (low, query, cos, sin, slots, latent, rope, scale)
        bound.query(bound.query_grid, written, (used,), sure)
        query = low if self.low is None else query
        bound.absorb(bound.absorb_grid, (query, cos, sin, q_latent, q_rope), (), sure)
        cache = (latent, rope, scale, used)
        partial, partial_lse, splits = self._attend(bound, q_latent, q_rope, cache, lengths, starts, window, sure)
        self._join(partial, partial_lse, splits, values)
        return self._output(values, torch.empty_like(x), x, sure)

    def _attend(self, bound, q_latent, q_rope, cache, lengths, starts, window, sure):
        """The splits' results, float32 [H, splits, C] and [H, splits], and how many splits there are."""
        latent, rope, scale, used = cache
        rank, turning = latent.shape[2], rope.shape[2]
        if scale is not None or tuning() is not None:
            coded = None if scale is None else scale[:, :used]
            parts = (latent[:, :used], rope[:, :used], self._scale, lengths, starts, coded, window)
            out, lse = mla_decode(self._heads(q_latent, rank), self._heads(q_rope, turning), *parts)
            return out.float(), lse, 1
        known = bound.lengths.get((used + 63) // 64)
        if known is None:
            known = bound.lengths[(used + 63) // 64] = self._plan(bound, q_latent, q_rope, cache, lengths, starts)
        launch, grid, tma, rooms = known
        partial, partial_lse = torch.empty(sum(rooms), dtype=torch.float32, device=latent.device).split_with_sizes(
            rooms
        )
        if tma and latent.is_cuda:
            triton.set_allocator(scratch)
        tensors = (q_latent, q_rope, latent, rope, lengths, starts, partial, partial_lse)
        launch(grid, tensors, (used, grid[1], window or NO_WINDOW), sure)
        return partial, partial_lse, grid[1]

    def _heads(self, queries, width):
        """[1, 1, H, width], which the flat ``queries`` begin with."""
        return queries[: self.heads * width].view(1, 1, self.heads, width)

    def _plan(self, bound, q_latent, q_rope, cache, lengths, starts):
        """For a length of the cache: the launch, its grid, whether it makes descriptors, and rooms for its results."""
        latent, rope, _, used = cache
        heads, rank = self.heads, latent.shape[2]
        q_latent, q_rope = self._heads(q_latent, rank), self._heads(q_rope, rope.shape[2])
        tiling, programs, splits = plan(q_latent, latent[:, :used], rope[:, :used], False)
        given = (q_latent, q_rope, latent, rope, None, lengths, starts, self._scale)
        launcher, numbers, constants = split_kernel(tiling, *given)
        launch = bound.tilings.setdefault(tiling, Bound(launcher, (), numbers, **constants))
        return launch, (programs, splits, 1), tiling.tma, [heads * splits * rank, _whole(heads * splits)]

    def _join(self, partial, partial_lse, splits, out):
        """Fill ``out`` with every head's values, from the splits over the latents."""
        launch = self._joins.get(splits)
        if launch is None:
            rank, row = self.kv_b.shape[1], self.kv_b.stride(0)
            numbers = (rank, self.width, self.kv_rows - self.width, self.kv_rows * row, row)
            blocks = {"C": next_power_of_2(rank), "BLOCK_S": 16, "SPLITS": next_power_of_2(splits)}
            launch = self._joins[splits] = Bound(
                _values, (self.kv_b,), numbers, **blocks, BLOCK_V=self._rows, num_warps=4
            )
        launch((self.heads, cdiv(self.width, self._rows), 1), (partial, partial_lse, out), (splits,))
