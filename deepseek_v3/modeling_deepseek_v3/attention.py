"""Multi-head Latent Attention in its two forms, over one cache of latents.

Expanded: latents become per-head keys and values through `kv_b_proj`, then any attention back end of transformers.
Absorbed: `kv_b_proj` is applied to the query and to the output instead, and attention runs on the latents as they
lie in the cache. Both give the same result (DeepSeek-V3 report, section 2.1.1); which is cheaper depends on how many
query tokens share one expansion.

Letters: B batch, T query tokens, S cached tokens, H heads, D hidden, C kv_lora_rank, R qk_rope_head_dim,
N qk_nope_head_dim, V v_head_dim.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..kernels import (
    absorb_outputs,
    absorb_queries,
    join_keys,
    mla_decode,
    norm_and_write,
    rotate_queries,
    rotate_queries_,
    write_latents,
)
from ..quantization import FP8Linear
from .cache import LatentCache, joint_latents
from .cache_layers import Extension
from .latents import Latents
from .layers import DeepseekV3RMSNorm, is_bare
from .rope import apply_rope, softmax_scale

# Bytes of expanded keys and values, and of what they are made of, that exist at once where no gradient is asked for.
EXPANDED_BYTES = 4 << 30


class Spans(NamedTuple):
    """The slots that each row's newest query sees, [starts, lengths), int32 [B]; None for all of them.

    extension: where the new tokens go, if every layer may write them through the kernel.
    window: slots that a query sees at most, itself included; None for all.
    """

    starts: torch.Tensor | None
    lengths: torch.Tensor | None
    extension: Extension | None = None
    window: int | None = None


def choose_form(config: Any, queries: int, keys: int, cached: bool) -> str:
    """ "absorbed" where it costs fewer FLOPs than expanding `keys` latents for `queries` tokens, else "expanded".

    Absorbing applies `kv_b_proj` to T tokens instead of S, and pays for it with wider products: it wins while
    T * S < break_even * (S - T). `config.mla_form` forces one of the two.
    """
    if config.mla_form != "auto":
        return config.mla_form
    # The break-even may be infinite, and infinity times no cached token is no number.
    if cached and keys > queries and queries * keys < config.absorbed_break_even * (keys - queries):
        return "absorbed"
    return "expanded"


def effective_weight(linear: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] that `linear` applies now, whatever wraps it.

    A plain linear lends its own weight, so an update is seen at once, and one in FP8 dequantises it each time.
    Anything else (adapters, other quantised weights, offload hooks) is asked for its products with the unit vectors,
    which no wrapper can make stale.

    Raises:
        ValueError: PEFT's `adapter_names` gives the rows of a batch different matrices.
    """
    # A subclass that trains in FP8 says so: its weight is the master weight.
    plain = type(linear) is nn.Linear or hasattr(linear, "parametrizations") or hasattr(linear, "lends_weight")
    if not hasattr(linear, "_hf_hook") and linear.weight.device.type != "meta":
        if plain:
            return linear.weight  # type: ignore[return-value]
        if isinstance(linear, FP8Linear):
            return linear.dequantized(like.dtype)
    unit = torch.eye(linear.in_features, dtype=like.dtype, device=like.device)  # type: ignore[call-overload]
    try:
        # As a batch of one, so that it is never taken for a batch with an adapter a row.
        return linear(unit[None])[0].transpose(0, 1)
    except ValueError as error:
        if "adapter_names" not in str(error):
            raise
        raise ValueError(
            "adapter_names gives each row of the batch a kv_b_proj of its own, and absorbed attention takes one for "
            'all: set model.config.mla_form = "expanded"'
        ) from error


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, softmax in float32: query and key [B, H, ., N + R], value [B, H, S, V] to [B, T, H, V]."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    probabilities = _softmax(scores, attention_mask, query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


def absorbed_attention(
    query: tuple[torch.Tensor, torch.Tensor],
    latents: torch.Tensor,
    weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all heads over the shared latents, without expanding them: multi-query attention of width C + R.

    Args:
        query: [B, H, T, N] and the rotated [B, H, T, R].
        latents: [B, S, C + R], latent and rotated key side by side.
        weight: [H * (N + V), C], the effective `kv_b_proj`.
        attention_mask: [B, 1, T, S], bool (True is seen) or additive. None: one query sees everything, several are
            causal from the first key on, as of SDPA's `is_causal` (a prompt in a fixed cache).
        scaling: factor on the logits.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, T, H, V] and the attention weights [B, H, T, S].
    """
    q_nope, q_rope = query
    batch, heads, length, nope = q_nope.shape
    keys, rank = latents.shape[1], weight.shape[-1]
    weight = weight.view(heads, -1, rank)  # [H, N + V, C]
    q = torch.cat((_per_head(q_nope, weight[:, :nope]), q_rope), dim=-1) * scaling  # [B, H, T, C + R]
    scores = torch.bmm(q.reshape(batch, heads * length, -1), latents.transpose(1, 2))
    if attention_mask is None and length > 1:
        attention_mask = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril()
    probabilities = _softmax(scores.view(batch, heads, length, keys), attention_mask, q_nope.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=dropout > 0)
    mixed = torch.bmm(probabilities.reshape(batch, heads * length, keys), latents[..., :rank])
    mixed = mixed.view(batch, heads, length, rank)
    output = _per_head(mixed, weight[:, nope:].transpose(1, 2))  # [B, H, T, V]
    return output.transpose(1, 2), probabilities


def fused_absorbed_attention(
    query: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    latents: Latents,
    weight: torch.Tensor,
    spans: Spans,
    scaling: float,
    interleave: bool,
) -> torch.Tensor:
    """`absorbed_attention` through the kernels: queries [B, T, H, N + R] that are not rotated yet, the newest T, over
    `spans` of the cache, whose latents are read as they are, [B, S, C] of codes too, to [B, T, H, V]."""
    heads, rope = query.shape[2], angles[0].shape[2]
    mixed, _ = mla_decode(
        *absorb_queries(query, weight, *angles, interleave=interleave),
        latents.latent,
        latents.rope,
        scale=scaling,
        lengths=spans.lengths,
        starts=spans.starts,
        latent_scale=latents.scale,
        sliding_window=spans.window,
    )
    return absorb_outputs(mixed, weight, weight.shape[0] // heads - (query.shape[3] - rope))


def spans_of(mask: torch.Tensor | None, queries: int, window: int | None = None) -> Spans | None:
    """What a boolean mask [B or 1, 1, T, S] shows, as spans for the decode kernel; None if it shows anything else.

    One host read a forward, where there is a mask. `window`: each query sees so many slots at most.
    """
    if mask is None:
        return Spans(None, None) if queries == 1 else None
    seen = mask[:, 0]  # [B, T, S]
    last = seen[:, -1].int()
    first = last if window is None else seen[:, 0].int()
    starts, lengths = first.argmax(dim=-1), last.shape[-1] - last.flip(-1).argmax(dim=-1)
    slots = torch.arange(last.shape[-1], device=mask.device)
    ends = lengths[:, None] - torch.arange(queries - 1, -1, -1, device=mask.device)  # [B, T]
    span = (slots >= starts[:, None, None]) & (slots < ends[..., None])
    if window is not None:
        span &= slots >= ends[..., None] - window
    return Spans(starts.int(), lengths.int(), window=window) if bool((span == seen).all()) else None


def step_spans(slots: torch.Tensor, starts: torch.Tensor | None, spans: Spans) -> Spans:
    """`spans` of a captured step with [B, T] slots in whole storage, of which each row sees up to its newest token."""
    assert spans.extension is not None
    return Spans(starts, (slots[:, -1] + 1).int(), spans.extension._replace(slots=slots), spans.window)


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, i] times each head's weight [H, i, o], one product a head for the whole batch: [B, H, T, o]."""
    batch, heads, length, width = x.shape
    rows = x.transpose(0, 1).reshape(heads, batch * length, width)
    return torch.bmm(rows, weight).view(heads, batch, length, -1).transpose(0, 1)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if mask is not None:
        if mask.dtype == torch.bool:
            # The lowest number instead of -inf: a row of padding that sees nothing stays finite.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    return nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)


class DeepseekV3Attention(nn.Module):
    """MLA with a low-rank query (or a plain one where `q_lora_rank` is None)."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1
        self.is_causal = True
        self.scaling = softmax_scale(config)
        # A configuration looks up its fields slowly, and a decode step reads these in every layer.
        self._split = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        self._rank, self._low_rank_query = config.kv_lora_rank, config.q_lora_rank is not None
        self._interleave = config.rope_interleave
        hidden, heads, bias = config.hidden_size, self.num_heads, config.attention_bias
        nope, rope, value = self._split
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekV3RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + rope, bias=bias)
        self.kv_a_layernorm = DeepseekV3RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        mla_form: str = "expanded",
        mla_spans: Spans | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, writing the new latents to the cache.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cos and sin, [B, T, R].
            attention_mask: for "expanded" what the attention back end takes, for "absorbed" a [B, 1, T, S] mask.
            past_key_values: any transformers cache.
            mla_form: "expanded" or "absorbed".
            mla_spans: what `attention_mask` shows, where the decode kernel is to serve the absorbed form.

        Returns:
            [B, T, D], and the attention weights [B, H, T, S] where the back end gives them.
        """
        if mla_spans is not None and mla_spans.extension is not None and self.lends_norms():
            return self._decode(hidden_states, position_embeddings, past_key_values, mla_spans), None
        query = self._project_query(hidden_states)
        latents = self._latents(self.kv_a_proj_with_mqa(hidden_states), position_embeddings)
        if past_key_values is not None:
            latents = past_key_values.update(*latents, self.layer_idx)
        if mla_form == "absorbed":
            joint = joint_latents(past_key_values, self.layer_idx, latents)
            if mla_spans is not None:
                held = Latents(joint[..., : self._rank], joint[..., self._rank :])
                return self._absorbed(query.transpose(1, 2), position_embeddings, held, mla_spans), None
            weight, split = effective_weight(self.kv_b_proj, joint), self._rotated(query, position_embeddings)
            dropout = self.attention_dropout if self.training else 0.0
            output, weights = absorbed_attention(split, joint, weight, attention_mask, self.scaling, dropout)
            shown = weights if self.config._attn_implementation == "eager" else None
        else:
            if isinstance(past_key_values, LatentCache) and past_key_values.sliding_window is not None:
                kwargs["sliding_window"] = past_key_values.sliding_window  # for back ends that take no mask
            output, shown = self._attend_expanded(query, latents, position_embeddings, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), shown

    def lends_norms(self) -> bool:
        """Whether the norms inside may be read as weights, as `_decode` does."""
        norms = (self.q_a_layernorm, self.kv_a_layernorm) if self._low_rank_query else (self.kv_a_layernorm,)
        return all(is_bare(norm, DeepseekV3RMSNorm) for norm in norms)

    def _decode(
        self, hidden_states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], cache: Any, spans: Spans
    ) -> torch.Tensor:
        """A few new tokens [B, T, D] over a `LatentCache`, whose latents a kernel writes to it."""
        assert spans.extension is not None
        held = cache.extend(self.layer_idx, spans.extension)
        norm, slots = self.kv_a_layernorm, spans.extension.slots
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        new = (held.latent, held.rope, compressed, norm.weight, *angles, slots)
        options = {"scale": held.scale, "eps": norm.variance_epsilon, "interleave": self._interleave}
        if self._low_rank_query:
            low, own = self.q_a_proj(hidden_states), self.q_a_layernorm
            query = self.q_b_proj(norm_and_write(low, own.weight, *new, low_eps=own.variance_epsilon, **options))
        else:
            query = self.q_proj(hidden_states)
            write_latents(*new, **options)
        query = query.view(*query.shape[:2], self.num_heads, -1)
        return self._absorbed(query, angles, held, spans)

    def _absorbed(
        self, query: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], latents: Latents, spans: Spans
    ) -> torch.Tensor:
        """Queries [B, T, H, N + R] over cached latents [B, S, C] and [B, S, R] through the kernels, to [B, T, D]."""
        weight = effective_weight(self.kv_b_proj, query)
        output = fused_absorbed_attention(query, angles, latents, weight, spans, self.scaling, self._interleave)
        return self.o_proj(output.flatten(2))

    def _project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, H, T, N + R], not yet rotated."""
        return self._up_query(self.q_a_proj(hidden_states) if self._low_rank_query else hidden_states)

    def _up_query(self, low: torch.Tensor) -> torch.Tensor:
        """`q_a_proj`'s output (or, without a low rank, the hidden states) to [B, H, T, N + R], not yet rotated."""
        query = self.q_b_proj(self.q_a_layernorm(low)) if self._low_rank_query else self.q_proj(low)
        return query.view(*low.shape[:-1], -1, self._split[0] + self._split[1]).transpose(1, 2)

    def _rotated(self, query: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        q_nope, q_rope = query.split(self._split[:2], dim=-1)
        return q_nope, apply_rope(q_rope, *angles, self._interleave)

    def _latents(self, compressed: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        latent, rope = compressed.split((self._rank, self._split[1]), dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # [B, 1, T, C]
        return latent, apply_rope(rope[:, None], *angles, self._interleave)  # [B, 1, T, R]

    def _attend_expanded(
        self, query: torch.Tensor, latents: Any, angles: tuple[torch.Tensor, torch.Tensor], mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The expanded form, some heads at a time where the keys and values of all would take too much memory.

        Where a gradient is asked for they are kept for the backward in any case.
        """
        latent, heads = latents[0][:, 0], query.shape[1]
        nope, rope, value = self._split
        # kv_b_proj's output beside the keys and values that are made of it.
        width = 2 * (nope + value) + rope
        bytes_a_head = latent.shape[0] * latent.shape[1] * width * latent.element_size()
        step = max(1, EXPANDED_BYTES // bytes_a_head)
        if torch.is_grad_enabled() or step >= heads:
            return self._attend(*self._heads(query, latents, angles, self.kv_b_proj(latent)), mask, **kwargs)
        weight = effective_weight(self.kv_b_proj, latent).view(heads, nope + value, -1)
        parts = []
        for first in range(0, heads, step):
            some = slice(first, first + step)
            expanded = nn.functional.linear(latent, weight[some].flatten(0, 1))
            # Nothing but the slice's output may outlive it.
            parts.append(self._attend(*self._heads(query[:, some], latents, angles, expanded), mask, **kwargs))
            del expanded
        weights = [part[1] for part in parts]
        shown = None if weights[0] is None else torch.cat(weights, dim=1)
        return torch.cat([part[0] for part in parts], dim=2), shown

    def _heads(
        self, query: torch.Tensor, latents: Any, angles: tuple[torch.Tensor, torch.Tensor], expanded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some heads' rotated query [B, H, T, N + R], key [B, H, S, N + R] and value [B, H, S, V], from queries that
        are not rotated yet and what `kv_b_proj` gives for these heads, [B, S, H * (N + V)]."""
        nope, _, value = self._split
        latent, k_rope = latents
        expanded = expanded.view(*latent[:, 0].shape[:2], -1, nope + value)
        if torch.is_grad_enabled():
            k, v = join_keys(expanded, k_rope[:, 0], nope)
        else:
            # The values may stay where they are; as they lie, a gradient would be joined to the keys' again.
            k, v = join_keys(expanded[..., :nope], k_rope[:, 0], nope)[0], expanded[..., nope:]
        # What a bare projection gave is nobody else's.
        up = self._modules["q_b_proj" if self._low_rank_query else "q_proj"]
        own = not torch.is_grad_enabled() and not is_torchdynamo_compiling() and is_bare(up, nn.Linear)  # type: ignore[arg-type]
        rotate = rotate_queries_ if own else rotate_queries
        q = rotate(query.transpose(1, 2), *angles, interleave=self._interleave)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
