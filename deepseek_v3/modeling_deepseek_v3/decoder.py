"""The decoder layer, and the MTP module that is one with a different entrance.

Letters: B batch, T tokens, D hidden.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.layout import is_moe_layer
from ..kernels import is_single, rms_norm
from .attention import DeepseekV3Attention
from .layers import DeepseekV3MLP, DeepseekV3RMSNorm, is_bare, on_kernels
from .moe import DeepseekV3MoE
from .single import Steps

# The layer's output, or that and the router's balance loss and load (None from a dense layer).
LayerOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class DeepseekV3DecoderLayer(GradientCheckpointingLayer):
    """Latent attention and a dense or expert MLP, each behind its norm and a residual."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        self.mlp = DeepseekV3MoE(config) if is_moe_layer(config, layer_idx) else DeepseekV3MLP(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._steps = Steps()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        router_statistics: bool = False,
        token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LayerOutput:
        """[B, T, D] to [B, T, D].

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cos and sin, [B, T, R].
            attention_mask: see `DeepseekV3Attention.forward`.
            past_key_values: any transformers cache.
            router_statistics: also return the router's balance loss and load (None from a dense layer). They leave
                the layer as outputs so that they are counted once under activation checkpointing.
            token_mask: [B, T], True for the tokens that the statistics count.
        """
        spans, joined = kwargs.get("mla_spans"), None
        if spans is not None and spans.extension is not None and not router_statistics:
            joined = self._single(hidden_states, position_embeddings, past_key_values, spans)
        if joined is not None:
            return joined
        normed, hidden_states = self._normed(self.input_layernorm, hidden_states)
        attended, _ = self.self_attn(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        normed, hidden_states = self._normed(self.post_attention_layernorm, attended, hidden_states)
        if router_statistics and isinstance(self.mlp, DeepseekV3MoE):
            output, balance_loss, load = self.mlp.forward_with_statistics(normed, token_mask)
            return hidden_states + output, balance_loss, load
        joined = None
        if _is_fused(self.post_attention_layernorm, attended) and is_bare(self.mlp, DeepseekV3MoE):
            joined = self.mlp.step(normed, hidden_states)
        hidden_states = hidden_states + self.mlp(normed) if joined is None else joined
        return (hidden_states, None, None) if router_statistics else hidden_states

    def _single(self, token: torch.Tensor, angles: Any, cache: Any, spans: Any) -> torch.Tensor | None:
        """The layer for a single token [1, 1, D] whose latent a kernel writes to the cache; None where the modules
        must be called."""
        if not on_kernels(token) or not is_single(token):
            return None
        attention = self._steps.attention(self, token.dtype)
        if attention is None:
            return None
        held, used = cache.opened(self.self_attn.layer_idx, spans.extension)
        seen: Any = {"lengths": spans.lengths, "starts": spans.starts, "sliding_window": spans.window}
        where = (held.latent, held.rope, angles, spans.extension.slots)
        token = attention(token, *where, scale=held.scale, used=used, **seen)
        mlp = self._steps.mlp(self, token.dtype)
        return token + self.mlp(self.post_attention_layernorm(token)) if mlp is None else mlp(token)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._steps = Steps()  # which hold what is moved or cast here
        return super()._apply(fn, recurse)

    def _normed(
        self, norm: Any, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after `x` joins it, behind `norm` and as it is; without a residual x is the stream."""
        if residual is not None and _is_fused(norm, x):
            return rms_norm(x, norm.weight, norm.variance_epsilon, residual=residual)  # type: ignore[return-value]
        stream = x if residual is None else residual + x
        return norm(stream), stream


def _is_fused(norm: nn.Module, x: torch.Tensor) -> bool:
    return on_kernels(x) and is_bare(norm, DeepseekV3RMSNorm)


class DeepseekV3SharedHead(nn.Module):
    """The norm before an MTP module's logits; the head itself is the main model's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekV3MTPLayer(DeepseekV3DecoderLayer):
    """One Multi-Token Prediction module (report, section 2.2): it joins the previous depth's state at a token with
    the embedding of a later token, and runs a decoder layer over the result.

    `eh_proj` has the embedding's half first, as the released weights do.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_states_first = config.mtp_hidden_states_first
        self.enorm = DeepseekV3RMSNorm(hidden, eps=eps)
        self.hnorm = DeepseekV3RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = DeepseekV3SharedHead(config)

    def forward(  # type: ignore[override]
        self, previous: torch.Tensor, inputs_embeds: torch.Tensor, *args: Any, normed: bool = False, **kwargs: Any
    ) -> LayerOutput:
        """Run the module; the result is the residual stream before `shared_head.norm`.

        Args:
            previous: [B, T, D], the previous depth's states; row i stands for token i.
            inputs_embeds: [B, T, D], row i the embedding of the token that this depth looks at from there.
            args, kwargs: as of `DeepseekV3DecoderLayer.forward`.
            normed: give the residual stream, the same after `shared_head.norm`, and the load (None unless
                `router_statistics`). Where the weights are sharded, they are whole in here alone.
        """
        halves = (self.enorm(inputs_embeds), self.hnorm(previous))
        joined = torch.cat(halves[::-1] if self.hidden_states_first else halves, dim=-1)
        output = super().forward(self.eh_proj(joined), *args, **kwargs)
        if not normed:
            return output
        residual, _, load = output if isinstance(output, tuple) else (output, None, None)
        return residual, self.shared_head.norm(residual), load

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        # The official files store the embedding and the head again here; by definition they are the main model's.
        for copy in ("embed_tokens.weight", "shared_head.head.weight"):
            state_dict.pop(prefix + copy, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[call-arg]
