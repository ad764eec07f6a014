"""DeepSeekMoE: sigmoid router with node-limited groups and a selection bias, fused routed experts, shared experts.

Special about it: the bias chooses experts and never weighs them; unchosen groups are masked with -inf; the experts
are two 3-D parameters (`gate_up_proj`, `down_proj`) that also accept the official per-expert names on loading.

Letters: B batch, T tokens, D hidden, E routed experts, K experts a token, G groups, F expert width.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..kernels import Router, experts_step, is_step, route
from ..quantization import fuse_official_names
from ..quantization.adapted import Factors, Stacks, Widened, from_under_adapters, frozen_experts, frozen_product
from .layers import DeepseekV3MLP, is_bare, on_kernels


class WideProduct(torch.autograd.Function):
    """x [n, D] times w [E, D] transposed, both of 16 bits on a GPU, in float32.

    Their products are exact in float32, where they are summed: nothing has to be widened first, and tensor cores
    serve. A float32 gradient goes through them as two bfloat16 numbers, which hold 16 of its 24 bits; results have 8.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return _wide(x, w.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        high = grad.to(x.dtype)
        parts = torch.cat((high, (grad - high).to(x.dtype)), dim=1)  # [n, 2E]
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _wide(parts, torch.cat((w, w))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = _wide(parts.t(), x).unflatten(0, (2, -1)).sum(0).to(w.dtype)
        return dx, dw


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of 16-bit matrices in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class DeepseekV3TopkRouter(nn.Module):
    """Top-K of E experts for each token, within the best `topk_group` of G groups (report, equations 12 to 16)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.num_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))
        # Tokens per expert since the last bias update. Not a buffer: DistributedDataParallel would overwrite every
        # rank's count with rank 0's at each forward.
        self.expert_load: torch.Tensor | None = None

    def as_router(self) -> Router:
        """What this does, for a kernel."""
        groups = (self.num_group, self.topk_group, self.top_k)
        return Router(
            self.weight, self.e_score_correction_bias, *groups, self.norm_topk_prob, self.routed_scaling_factor
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route [.., D] tokens: raw logits [n, E], weights [n, K] (both float32) and expert indices [n, K]."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = self._logits(hidden_states)
        if on_kernels(logits):
            indices, weights = route(
                logits,
                self.e_score_correction_bias,
                groups=self.num_group,
                kept_groups=self.topk_group,
                top_k=self.top_k,
                normalise=self.norm_topk_prob,
                scaling=self.routed_scaling_factor,
            )
            return logits, weights, indices
        scores = logits.sigmoid()
        indices = self._choose(scores + self.e_score_correction_bias)
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[n, D] to float32 [n, E]."""
        dtype = hidden_states.dtype
        # Gradients in float16 would need a scale of their own.
        narrow = dtype == torch.bfloat16 or (dtype == torch.float16 and not torch.is_grad_enabled())
        if narrow and hidden_states.is_cuda and dtype == self.weight.dtype and not is_torchdynamo_compiling():
            return WideProduct.apply(hidden_states, self.weight)
        # Under autocast a linear would run in the low dtype whatever its inputs are.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float())

    def _choose(self, biased: torch.Tensor) -> torch.Tensor:
        if self.num_group > self.topk_group:
            grouped = biased.view(-1, self.num_group, self.num_experts // self.num_group)
            group_scores = grouped.topk(2, dim=-1)[0].sum(dim=-1)  # [n, G]
            chosen = group_scores.topk(self.topk_group, dim=-1, sorted=False)[1]
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
            biased = grouped.masked_fill(closed[..., None], float("-inf")).view_as(biased)
        return biased.topk(self.top_k, dim=-1, sorted=False)[1]

    def count(self, load: torch.Tensor) -> None:
        """Add tokens per expert [E] to what the next bias update will see."""
        load = load.detach()
        self.expert_load = load.clone() if self.expert_load is None else self.expert_load.to(load.device).add_(load)


def sequence_balance_loss(
    logits: torch.Tensor, top_k: int, token_mask: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor:
    """The sequence-wise balance loss before its factor alpha, averaged over sequences (report, equations 17 to 20).

    f_i counts how often expert i is among the raw top-K scores (no bias, no groups; no gradient), P_i is its mean
    share of the scores; perfect balance gives 1.

    Args:
        logits: [B * T, E] router logits, float32.
        top_k: K.
        token_mask: [B, T], True for real tokens, or None where all are.
        shape: (B, T).
    """
    batch, length = shape
    experts = logits.shape[-1]
    scores = logits.sigmoid().view(batch, length, experts)
    hits = torch.zeros_like(scores).scatter_(2, scores.detach().topk(top_k, dim=-1)[1], 1.0)
    shares = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    if token_mask is None:
        return (hits.mean(dim=1) * shares.mean(dim=1)).sum(dim=-1).mean() * (experts / top_k)
    real = token_mask[..., None].to(scores.dtype)
    tokens = real.sum(dim=1)  # [B, 1]
    frequency = (hits * real).sum(dim=1) / tokens.clamp(min=1) * (experts / top_k)
    share = (shares * real).sum(dim=1) / tokens.clamp(min=1)
    sequences = (tokens > 0).sum().clamp(min=1)
    return (frequency * share).sum() / sequences


@use_experts_implementation
class _PlainExperts(Stacks):
    """`DeepseekV3Experts` as its implementations know it: any of transformers', ours, or the "eager" one here."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The "eager" implementation, one expert after another.

        Args:
            hidden_states: [n, D].
            top_k_index: [n, K] experts of each token.
            top_k_weights: [n, K] their weights.

        Returns:
            [n, D], weighted and summed over the K experts. No token is dropped.
        """
        top_k, pairs = top_k_index.shape[1], top_k_index.reshape(-1)
        order = pairs.argsort(stable=True)  # token-expert pairs, sorted by expert
        # Under expert parallelism the pairs of other ranks' experts have index E: they come last and give zeros.
        *counts, foreign = torch.bincount(pairs, minlength=self.num_experts + 1).tolist()
        pieces = hidden_states[order[: len(order) - foreign] // top_k].split(counts)
        results = [self._expert(expert, rows) for expert, rows in enumerate(pieces) if len(rows)]
        results.append(hidden_states.new_zeros(foreign, self.hidden_dim))
        weighted = torch.cat(results) * top_k_weights.reshape(-1)[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return weighted[inverse].view(-1, top_k, self.hidden_dim).sum(dim=1).to(hidden_states.dtype)

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        fuse_official_names(self, state_dict, prefix, missing=rest[2], errors=rest[4])
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[call-arg]


class DeepseekV3Experts(_PlainExperts):
    """E SwiGLU experts as `gate_up_proj` [E, 2F, D] (gate rows first) and `down_proj` [E, D, F]."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        factors: dict[str, Factors] | None = None,
    ) -> torch.Tensor:
        """[n, D] tokens, weighted and summed over the K experts of each: see `_PlainExperts.forward`.

        Args:
            factors: changes by name to stacks that do not learn themselves. They multiply beside them, whatever the
                implementation is.
        """
        if not factors:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]

        def stack(name: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            weight = getattr(self, name)
            return frozen_product(rows, Widened(lambda dtype: (weight.to(dtype), offsets)), offsets, factors.get(name))

        kind, dtype = hidden_states.device.type, hidden_states.dtype
        if dtype == torch.float32 and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return frozen_experts(self, stack, hidden_states, top_k_index, top_k_weights, dtype)


def _stacks(experts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return experts.gate_up_proj, experts.down_proj


class DeepseekV3MoE(nn.Module):
    """Routed experts for the tokens' top-K, plus the shared experts for every token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.gate = DeepseekV3TopkRouter(config)
        self.experts = DeepseekV3Experts(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = DeepseekV3MLP(config, intermediate_size=shared) if shared else None

    @property
    def router(self) -> DeepseekV3TopkRouter:
        """The gate, from under the adapters that may wrap it."""
        return next(module for module in self.gate.modules() if isinstance(module, DeepseekV3TopkRouter))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.forward_with_statistics(hidden_states, None, wanted=False)[0]

    def forward_with_statistics(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None, wanted: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """[B, T, D] to [B, T, D]; of the tokens that `token_mask` [B, T] marks, where wanted, also the balance loss
        (0-d, alpha in it) and the load (tokens per expert [E], float32)."""
        shape = hidden_states.shape
        logits, weights, indices = self.gate(hidden_states)
        output = self._joined(hidden_states, indices, weights)
        if not wanted:
            return output, None, None
        return output, *self._statistics(logits, indices, token_mask, (shape[0], shape[1]))

    def _joined(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        shape = hidden_states.shape
        output = self._routed(hidden_states.reshape(-1, shape[-1]), indices, weights).view(shape)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)

    def step(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """`residual + self(hidden_states)` of a few tokens [B, T, D] in a handful of launches; None where `forward`
        must be called because something wraps what is inside, or the tokens are many."""
        shared = self.shared_experts
        experts: Any = self.experts
        if self.config._experts_implementation != "deepseek_v3" or not is_bare(experts, DeepseekV3Experts):
            return None
        if shared is None or experts._is_expert_parallel or not shared.lends_weights():
            return None
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        weight = shared.gate_proj.weight
        _, weights, indices = self.gate(hidden_states)
        if not is_step(experts, tokens, indices, weights, weight):
            return residual + self._joined(hidden_states, indices, weights)
        own = (weight, shared.up_proj.weight, shared.down_proj.weight)
        return experts_step(experts, tokens, indices, weights, own, residual.view_as(tokens)).view_as(residual)

    def _routed(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not (tokens.requires_grad and tokens.device.type == "cpu"):
            return self._experts(tokens, indices, weights)
        # Every implementation gathers a token once for each of its experts; the gather's backward then adds K
        # gradients to one row in whatever order the threads come. Handing each token-expert pair over as a token of
        # its own leaves that sum to a reduction of fixed order: CPU runs repeat bit for bit.
        top_k = indices.shape[1]
        pairs = tokens[:, None].expand(-1, top_k, -1).reshape(-1, tokens.shape[-1])
        output = self._experts(pairs, indices.reshape(-1, 1), weights.reshape(-1, 1))
        return output.view(-1, top_k, tokens.shape[-1]).sum(dim=1)

    def _experts(self, *arguments: torch.Tensor) -> torch.Tensor:
        """The experts, with what adapters on frozen stacks change beside them."""
        found = from_under_adapters(self.experts)
        if found is None or any(stack.requires_grad for stack in _stacks(found[0])):
            return self.experts(*arguments)  # type: ignore[no-any-return]
        experts, factors = found
        return experts(*arguments, factors=factors)  # type: ignore[no-any-return]

    def _statistics(
        self, logits: torch.Tensor, indices: torch.Tensor, token_mask: torch.Tensor | None, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones_like(indices, dtype=torch.float32)
        if token_mask is not None:
            ones = ones * token_mask.reshape(-1, 1)
        load = ones.new_zeros(logits.shape[-1]).scatter_add_(0, indices.reshape(-1), ones.reshape(-1))
        alpha = self.config.seq_balance_loss_alpha
        if not alpha:
            return logits.new_zeros(()), load
        return alpha * sequence_balance_loss(logits, indices.shape[1], token_mask, shape), load
