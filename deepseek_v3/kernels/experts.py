"""The routed experts of a mixture: sort the pairs, two grouped products with SwiGLU between, weighted sum back.

T tokens, D hidden, E experts, K experts a token, F expert width, P = T * K pairs. Source: DeepSeek-V3 report,
equations 12 and 13. Nothing here reads a number back from the device, so a step can be captured in a CUDA graph.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from . import dispatch
from .grouped import grouped_gemm
from .norm import TRITON_DTYPES
from .permute import combine_pairs, gather_pairs, sort_pairs
from .reference import experts as reference
from .swiglu import swiglu

OPERATION = "experts_decode"
# Up to so many pairs an expert on average, the time is that of reading the weights.
FEW_ROWS = 16
# Up to so many tokens the shared experts, too, take the time of reading their weights.
STEP_TOKENS = 64


class Experts(Protocol):
    """What the experts' module holds: gate_up_proj [E, 2F, D] with the gate rows first, down_proj [E, D, F]."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    act_fn: Callable[[torch.Tensor], torch.Tensor]


def _reasons(device: torch.device) -> dispatch.Reasons:
    return {"triton": dispatch.triton_reason(device), "torch": None}


dispatch.OPERATIONS[OPERATION] = _reasons


def _decode_fake(hidden, gate_up, down, index, weights, backend):
    return hidden.new_empty(hidden.shape)


@dispatch.define(
    "experts_decode(Tensor hidden, Tensor gate_up, Tensor down, Tensor index, Tensor weights, str backend) -> Tensor",
    _decode_fake,
)
def _decode(hidden, gate_up, down, index, weights, backend):
    """Four launches: sort, up with gather and SwiGLU, down, weighted sum; two for one token. Each weight that is hit
    is read once."""
    reasons = _reasons(hidden.device)
    if any(t.stride(-1) != 1 for t in (hidden, gate_up, down)):
        reasons["triton"] = reasons["triton"] or "a last dimension that is not dense"
    if hidden.dtype not in TRITON_DTYPES:
        reasons["triton"] = reasons["triton"] or f"{hidden.dtype}"
    if dispatch.choose(OPERATION, reasons, backend, hidden.device) == "torch":
        return _decode_reference(hidden, gate_up, down, index, weights)
    if index.shape[0] == 1 and hidden.dtype == gate_up.dtype:
        from .triton.launch_single import ChosenExperts, aligned

        given = (hidden.contiguous(), index.contiguous(), weights.contiguous())
        return ChosenExperts(gate_up, down, index.shape[1])(*given, sure=aligned(*given))
    from .triton.launch_grouped import grouped_rows_few
    from .triton.launch_permute import combine, sort_pairs

    pairs, width = index.numel(), down.shape[2]
    order, inverse, offsets = sort_pairs(index, gate_up.shape[0])
    act = torch.empty(pairs, width, dtype=hidden.dtype, device=hidden.device)
    grouped_rows_few(hidden, gate_up, offsets, order, index.shape[1], True, act)
    out = torch.empty(pairs, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    grouped_rows_few(act, down, offsets, None, 1, False, out)
    return combine(out, inverse, offsets, weights.contiguous(), hidden.shape[0])


def _decode_reference(hidden, gate_up, down, index, weights):
    order, inverse, offsets = reference.sort_pairs(index, gate_up.shape[0])
    x = reference.gather_rows(hidden, order, index.shape[1])
    gate, up = reference.grouped_gemm(x, gate_up, offsets, False).chunk(2, dim=-1)
    y = reference.grouped_gemm(F.silu(gate) * up, down, offsets, False)
    return reference.combine(y, inverse, offsets, weights, hidden.shape[0])


def _step_fake(hidden, gate_up, down, index, weights, shared_gate, shared_up, shared_down, residual, backend):
    return hidden.new_empty(hidden.shape)


@dispatch.define(
    "experts_step(Tensor hidden, Tensor gate_up, Tensor down, Tensor index, Tensor weights, Tensor shared_gate,"
    " Tensor shared_up, Tensor shared_down, Tensor residual, str backend) -> Tensor",
    _step_fake,
)
def _step(hidden, gate_up, down, index, weights, shared_gate, shared_up, shared_down, residual, backend):
    """As `_decode` with the shared experts and the residual in the same launches; one token needs no sort."""
    reasons = _reasons(hidden.device)
    if any(t.stride(-1) != 1 for t in (hidden, gate_up, down, shared_gate, shared_up, shared_down)):
        reasons["triton"] = reasons["triton"] or "a last dimension that is not dense"
    if (
        hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32)
        or shared_gate.stride() != shared_up.stride()
    ):
        reasons["triton"] = reasons["triton"] or f"{hidden.dtype}, or shared weights of different layouts"
    if dispatch.choose(OPERATION, reasons, backend, hidden.device) == "torch":
        routed = _decode_reference(hidden, gate_up, down, index, weights)
        shared = F.linear(F.silu(F.linear(hidden, shared_gate)) * F.linear(hidden, shared_up), shared_down)
        return residual + (routed + shared)
    from .triton.launch_grouped import experts_step as launch
    from .triton.launch_permute import combine, sort_pairs

    tokens, pairs, device, dtype = hidden.shape[0], index.numel(), hidden.device, hidden.dtype
    order, inverse, offsets = (index, index, None) if tokens == 1 else sort_pairs(index, gate_up.shape[0])
    act = torch.empty(pairs + tokens, max(down.shape[2], shared_down.shape[1]), dtype=dtype, device=device)
    launch(hidden, gate_up, act, offsets, order, index.shape[1], True, (shared_gate, shared_up), 0, tokens)
    out = torch.empty(pairs + tokens, hidden.shape[1], dtype=dtype, device=device)
    launch(act, down, out, offsets, order, 1, False, (shared_down, shared_down), pairs, tokens)
    return combine(out, inverse, offsets, weights.contiguous(), tokens, gate_up.shape[0], True, residual.contiguous())


def is_silu(act_fn: Callable) -> bool:
    """Whether an activation is SiLU, which the fused kernels know."""
    return act_fn is F.silu or isinstance(act_fn, torch.nn.SiLU) or type(act_fn).__name__ == "SiLUActivation"


def _is_decode(hidden, gate_up, down, index, weights, act_fn) -> bool:
    """Whether the fused form serves: few rows an expert, SwiGLU, no gradient wanted."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, gate_up, down, weights)):
        return False
    if not is_silu(act_fn) or not hidden.dtype == gate_up.dtype == down.dtype:
        return False
    return 0 < index.numel() <= FEW_ROWS * gate_up.shape[0]


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Float32 tensors in the dtype of the autocast in force, if one is."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def is_step(
    experts: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor
) -> bool:
    """Whether ``experts_step`` serves these tokens; shared: the shared experts' ``gate_proj`` weight."""
    gate_up = experts.gate_up_proj
    few = index.shape[0] <= STEP_TOKENS and not torch.is_autocast_enabled(hidden.device.type)
    same = shared.dtype == hidden.dtype and weights.shape == index.shape
    return few and same and _is_decode(hidden, gate_up, experts.down_proj, index, weights, experts.act_fn)


def experts_step(
    experts: Experts,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    residual: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """``experts_forward`` of a few tokens plus their shared experts plus ``residual``, in three to four launches.

    Args:
        experts: as ``self`` of ``experts_forward``. hidden: [T, D]. index, weights: [T, K].
        shared: gate and up [S, D] and down [D, S] of the shared experts, in hidden's dtype.
        residual: [T, D], hidden's dtype.
        backend: "auto", "triton" or "torch".

    Returns:
        [T, D]. No gradient: ask ``is_step`` first.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    gate, up, down = shared
    if residual.shape != hidden.shape or gate.shape != up.shape or down.shape != gate.shape[::-1]:
        raise ValueError(
            f"residual {tuple(residual.shape)} must be {tuple(hidden.shape)}, and the shared experts' gate "
            f"{tuple(gate.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} [S, D], [S, D], [D, S]"
        )
    arguments = (experts.gate_up_proj, experts.down_proj, index, weights, gate, up, down, residual, backend)
    return dispatch.ops.experts_step(hidden, *arguments)


def experts_forward(
    self: Experts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """Weighted sum of each token's experts, ``down(act(gate x) * up x)``, with the weights applied after ``down``.

    The signature is the one of transformers' experts interface; ``self`` has ``gate_up_proj`` [E, 2F, D] (gate rows
    first), ``down_proj`` [E, D, F] and ``act_fn``. Differentiable in hidden_states, both weights and
    top_k_weights.

    Args:
        hidden_states: [T, D] or [..., D], the dtype of the weights; under autocast all float32 ones are taken in its
            dtype, as a linear layer takes them.
        top_k_index: integer [T, K]; an index of E or more is an expert that lives elsewhere and adds nothing.
        top_k_weights: floating [T, K].
        backend: "auto", "triton" or "torch".

    Returns:
        The shape and dtype of hidden_states (under autocast, its dtype).

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    if top_k_index.shape != top_k_weights.shape or top_k_index.dim() != 2 or top_k_index.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"top_k_index {tuple(top_k_index.shape)} and top_k_weights {tuple(top_k_weights.shape)} must both be "
            f"[{hidden.shape[0]}, K]"
        )
    hidden, gate_up, down = _as_autocast(hidden, self.gate_up_proj, self.down_proj)
    if _is_decode(hidden, gate_up, down, top_k_index, top_k_weights, self.act_fn):
        out = dispatch.ops.experts_decode(hidden, gate_up, down, top_k_index, top_k_weights, backend)
        return out.view(hidden_states.shape)
    order, inverse, offsets = sort_pairs(top_k_index, gate_up.shape[0], backend=backend)
    x = gather_pairs(hidden, order, inverse, offsets, backend=backend)
    both = grouped_gemm(x, gate_up, offsets, backend=backend)
    if is_silu(self.act_fn):
        act = swiglu(both, backend=backend)
    else:
        gate, up = both.chunk(2, dim=-1)
        act = self.act_fn(gate) * up
    y = grouped_gemm(act, down, offsets, backend=backend)
    return combine_pairs(y, inverse, offsets, top_k_weights, backend=backend).view(hidden_states.shape)
