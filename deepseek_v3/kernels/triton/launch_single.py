"""Launches of a decode step of a single token, each bound once to what stays from step to step."""

import torch
import triton

from ..reference.norm import AMAX_FLOOR
from ..tuning import active as tuning
from .launch_mla import NO_WINDOW, mla_decode, plan, rooms, scratch, split_kernel
from .launch_norm import of_cache
from .launch_permute import choice, choose
from .launching import Bound, Launcher, cdiv, next_power_of_2
from .single import single_absorb, single_down, single_products, single_query, single_up, single_values
from .tilings import SINGLE, SINGLE_SHALLOW, SINGLE_SWIGLU, Stretch

_products, _query, _absorb, _values = map(Launcher, (single_products, single_query, single_absorb, single_values))
_up, _down = Launcher(single_up), Launcher(single_down)


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether each lies where a kernel may read 16 bytes at once, as everything freshly allocated does."""
    return not any(x is not None and x.data_ptr() % 16 for x in tensors)


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
        self.size, self._weights = rows + more, (gain, w, w if second is None else second)
        self._grid = (cdiv(rows, tiling.rows) + cdiv(more, tiling.rows), 1, 1)
        numbers = (rows, more, depth, eps, w.stride(0), self._weights[2].stride(0))
        flags = {"NORM": gain is not None, "SWIGLU": swiglu, "ADD": add}
        self._launch = Bound(_products, numbers, **flags, **_blocks(tiling, depth))

    def __call__(self, x, out, residual=None, sure=True):
        """Fill and return ``out``; x and it are dense, of as many numbers as the weights say."""
        self._launch(self._grid, (x, *self._weights, out, residual), (), sure)
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
    """The sum of a token's experts, each times its share; of norm(x) where there is a gain; plus the shared experts'
    (gate, up, down) and the residual, if any."""

    def __init__(self, gate_up, down, top_k, norm=(None, 0.0), shared=None, tilings=(None, None)):
        first, second = tilings[0] or SINGLE_SWIGLU, tilings[1] or SINGLE
        gain, eps = norm
        experts, rows, width = down.shape
        gate, up, shared_down = (gate_up[0], gate_up[0], down[0]) if shared is None else shared
        wide = 0 if shared is None else gate.shape[0]
        self._gain, self._first, self._second = gain, (gate_up, gate, up), (down, shared_down)
        self._size = top_k * width + wide
        self._grids = (cdiv(wide, first.rows) + top_k * cdiv(width, first.rows), 1, 1), (cdiv(rows, second.rows), 1, 1)
        depth = gate_up.shape[2]
        numbers = (experts, width, depth, wide, top_k, eps, *gate_up.stride()[:2], gate.stride(0))
        self._up = Bound(_up, numbers, NORM=gain is not None, **_blocks(first, depth))
        numbers = (experts, rows, width, wide, *down.stride()[:2], shared_down.stride(0))
        self._down = Bound(_down, numbers, PAIRS=top_k, ADD=shared is not None, **_blocks(second, width, wide))

    def __call__(self, x, index, share, residual=None, sure=True):
        """As x, [1, D] or [1, 1, D]; index and share [1, K]."""
        act = torch.empty(self._size, dtype=x.dtype, device=x.device)
        self._up(self._grids[0], (x, self._gain, *self._first, index, act), (), sure)
        out = torch.empty_like(x)
        self._down(self._grids[1], (act, *self._second, index, share, residual, out), (), sure)
        return out


class Experts:
    """See ``deepseek_v3.kernels.SingleExperts``."""

    def __init__(self, norm, router, gate_up, down, shared):
        weight, self._bias, *rest = router
        self._top_k = router.top_k
        self._score = Products(weight, None, *norm)
        numbers, constants = choice(weight.shape[0], weight.shape[0], self._bias, *rest)
        self._choose = Bound(choose, numbers, **constants)
        self._experts = ChosenExperts(gate_up, down, router.top_k, norm, shared)

    def __call__(self, x):
        sure, device = aligned(x), x.device
        logits = self._score(x, torch.empty(self._score.size, dtype=torch.float32, device=device), sure=sure)
        index = torch.empty(1, self._top_k, dtype=torch.int64, device=device)
        share = torch.empty(1, self._top_k, dtype=torch.float32, device=device)
        self._choose((1, 1, 1), (logits, self._bias, index, share))
        return self._experts(x, index, share, x, sure)


class _OverCache:
    """An attention's launches over one layout of the cache; those over its length by how many tiles that is."""

    def __init__(self, owner, latent, rope, scale):
        strides, constants = of_cache(latent, rope, scale, owner.interleave)
        rank, half = latent.shape[2], rope.shape[2] // 2
        tiling, depth = SINGLE_SHALLOW, owner.depth
        rows = 0 if owner.low is None else owner.q_b.shape[0]
        numbers = (rows, depth, owner.low_eps, owner.q_b.stride(0), rank, half, owner.kv_norm.eps, AMAX_FLOOR,
                   strides[1], strides[3], *strides[5:])  # fmt: skip
        self.query_grid = (1 + cdiv(rows, tiling.rows), 1, 1)
        self.query = Bound(_query, numbers, **constants | _blocks(tiling, depth))
        nope = owner.q_b.shape[0] // owner.heads - 2 * half
        columns = min(128, next_power_of_2(rank))
        row = owner.kv_b.stride(0)
        numbers = (nope, rank, half, nope + 2 * half, owner.kv_rows * row, row)
        self.absorb_grid = (owner.heads, cdiv(rank, columns), 1)
        self.absorb = Bound(
            _absorb, numbers, INTERLEAVE=owner.interleave, HALF=next_power_of_2(half), BLOCK_N=next_power_of_2(nope),
            BLOCK_C=columns, num_warps=4,
        )  # fmt: skip
        self.lengths, self.tilings = {}, {}


class Attention:
    """See ``deepseek_v3.kernels.SingleAttention``."""

    def __init__(self, weights, heads, softmax_scale, interleave):
        norm, q_a, self.low, kv_a, self.kv_norm, self.q_b, kv_b, o = weights
        self.heads, self.interleave, self._scale = heads, interleave, softmax_scale
        self.low_eps = 0.0 if self.low is None else self.low.eps
        self._project = Products(self.q_b if q_a is None else q_a, kv_a, *norm)
        self.depth = self._project.size - kv_a.shape[0]
        # The matrix itself and no view of it, which would outlive a model that is moved.
        self.kv_b, self.kv_rows, self._width = kv_b, kv_b.shape[0] // heads, o.shape[1] // heads
        self._output = Products(o, add=True)
        self._rows = min(32, next_power_of_2(self._width))
        self._layouts, self._joins = {}, {}

    def __call__(self, x, latent, rope, scale, cos, sin, slots, lengths, starts, window):
        sure = aligned(x, latent, rope, scale, cos, sin, slots, lengths, starts)
        layout = (latent.dtype, latent.stride(1), rope.stride(1), cos.dtype, slots.dtype)
        kinds = (*layout, None if lengths is None else lengths.dtype, None if starts is None else starts.dtype)
        bound = self._layouts.get(kinds)
        if bound is None:
            bound = self._layouts[kinds] = _OverCache(self, latent, rope, scale)
        make = {"dtype": x.dtype, "device": x.device}
        low = self._project(x, torch.empty(self._project.size, **make), sure=sure)
        query = low if self.low is None else torch.empty(self.q_b.shape[0], **make)
        gain = self.kv_norm.weight if self.low is None else self.low.weight
        written = (low, gain, self.q_b, query, self.kv_norm.weight, cos, sin, slots, latent, rope, scale)
        bound.query(bound.query_grid, written, (latent.shape[1],), sure)
        q_latent = torch.empty(1, 1, self.heads, latent.shape[2], **make)
        q_rope = torch.empty(1, 1, self.heads, rope.shape[2], **make)
        bound.absorb(bound.absorb_grid, (query, self.kv_b, cos, sin, q_latent, q_rope), (), sure)
        partial, partial_lse, splits = self._attend(
            bound, q_latent, q_rope, latent, rope, scale, lengths, starts, window, sure
        )
        values = self._join(partial, partial_lse, splits, torch.empty(self.heads * self._width, **make))
        return self._output(values, torch.empty_like(x), x, sure)

    def _attend(self, bound, q_latent, q_rope, latent, rope, scale, lengths, starts, window, sure):
        """The splits' results, and how many splits there are."""
        if scale is not None or tuning() is not None:
            given = (q_latent, q_rope, latent, rope, self._scale, lengths, starts, scale, window)
            return *mla_decode(*given), 1
        slots, tiles = latent.shape[1], cdiv(latent.shape[1], 64)
        known = bound.lengths.get(tiles)
        if known is None:
            tiling, programs, splits = plan(q_latent, latent, rope, False)
            launcher, numbers, constants = split_kernel(
                tiling, q_latent, q_rope, latent, rope, None, lengths, starts, self._scale
            )
            launch = bound.tilings.setdefault(tiling, Bound(launcher, numbers, **constants))
            known = bound.lengths[tiles] = (launch, (programs, splits, 1), tiling.tma)
        launch, grid, tma = known
        partial, partial_lse = rooms(q_latent, grid[1])
        if tma and q_latent.is_cuda:
            triton.set_allocator(scratch)
        tensors = (q_latent, q_rope, latent, rope, lengths, starts, partial, partial_lse)
        launch(grid, tensors, (slots, grid[1], window or NO_WINDOW), sure)
        return partial, partial_lse, grid[1]

    def _join(self, partial, partial_lse, splits, out):
        """Every head's values, to and as ``out`` [H * V], from the splits over the latents."""
        launch = self._joins.get(splits)
        if launch is None:
            rank, row = self.kv_b.shape[1], self.kv_b.stride(0)
            numbers = (rank, self._width, self.kv_rows - self._width, self.kv_rows * row, row)
            launch = self._joins[splits] = Bound(
                _values, numbers, C=next_power_of_2(rank), BLOCK_S=16, SPLITS=next_power_of_2(splits),
                BLOCK_V=self._rows, num_warps=4,
            )  # fmt: skip
        grid = (self.heads, cdiv(self._width, self._rows), 1)
        launch(grid, (partial, partial_lse, self.kv_b, out), (splits,))
        return out
