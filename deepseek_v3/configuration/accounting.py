"""What a configuration costs, from the configuration alone: parameters, FLOPs, bytes. No weights are made.

The counts follow the published definitions: a parameter is a trained number or the router's selection bias, and
"activated" is what one token passes through (top-k routed experts, shared experts, everything dense).
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from .layout import is_moe_layer, layer_tensors, mlp_matrices, official_tensors, outer_tensors

BYTES = {"fp8": 1, "scale": 4, "bf16": 2, "f32": 4}
# Bytes a number of bitsandbytes' NF4 with double quantisation: four bits, a byte for each 64 of them, a float32 for
# each 256 of those bytes.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
_WIDTHS = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def _width(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in _WIDTHS:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_WIDTHS)}")
    return _WIDTHS[name]


@dataclass(frozen=True)
class Account:
    """The bill of one configuration. Integers are exact; every property is derived from the tensors' shapes."""

    config: Any

    @cached_property
    def parts(self) -> dict[str, int]:
        """Parameters by part of the main model: embedding, head, attention, dense_mlp, routed_experts,
        shared_experts, router, norms. They add up to `main_parameters`."""
        parts: Counter[str] = Counter()
        embedding, *last = outer_tensors(self.config)
        parts[part_of(embedding.name)] += prod(embedding.shape)
        # Layers of a kind are all alike: one of each is counted out.
        kinds: dict[bool, list[int]] = {}
        for layer_idx in range(self.config.num_hidden_layers):
            kinds.setdefault(is_moe_layer(self.config, layer_idx), []).append(layer_idx)
        for layers in kinds.values():
            for spec in layer_tensors(self.config, layers[0]):
                parts[part_of(spec.name)] += len(layers) * prod(spec.shape)
        for spec in last:
            parts[part_of(spec.name)] += prod(spec.shape)
        return dict(parts)

    @cached_property
    def main_parameters(self) -> int:
        """Parameters of the main model, embedding and head included, MTP not."""
        return sum(self.parts.values())

    @cached_property
    def mtp_parameters(self) -> int:
        """Parameters that only the MTP modules hold (their copies of embedding and head not counted)."""
        return self._mtp_stored - self._mtp_copies

    @cached_property
    def checkpoint_parameters(self) -> int:
        """Numbers stored in the official file without its FP8 scales: main, MTP and MTP's copies."""
        return self.main_parameters + self._mtp_stored

    @cached_property
    def activated_parameters(self) -> int:
        """Parameters that one token activates in the main model; the head is counted, the embedding is not."""
        idle = self.config.n_routed_experts - self.config.num_experts_per_tok
        return self.main_parameters - self.moe_layers * idle * self.expert_parameters - self._embedding_only

    @cached_property
    def activated_parameters_with_embedding(self) -> int:
        """`activated_parameters` and the input embedding's table."""
        return self.activated_parameters + self._embedding_only

    @cached_property
    def mtp_activated_parameters(self) -> int:
        """Parameters that one token activates in the MTP modules, neither embedding nor head counted."""
        idle = self.config.n_routed_experts - self.config.num_experts_per_tok
        return self.mtp_parameters - (self.config.num_nextn_predict_layers or 0) * idle * self.expert_parameters

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return sum(prod(shape) for _, shape in mlp_matrices(self.config, self.config.moe_intermediate_size))

    @cached_property
    def moe_layers(self) -> int:
        """How many of the main model's layers hold experts."""
        return sum(is_moe_layer(self.config, i) for i in range(self.config.num_hidden_layers))

    def weight_bytes(self, dtype: Any = "bfloat16") -> int:
        """Bytes of the official file's tensors.

        Args:
            dtype: "float8_e4m3fn" for the FP8 files (scales included; embedding, head, norms, router and eh_proj
                BF16), else the dtype of every tensor but the float32 router bias.
        """
        width = _width(dtype)
        if width == 1:
            return sum(prod(s.shape) * BYTES[s.kind] for s in official_tensors(self.config, quantized=True))
        return sum(prod(s.shape) * (4 if s.kind == "f32" else width) for s in official_tensors(self.config))

    def cache_bytes_per_token(self, dtype: Any = "bfloat16", mtp: bool = False) -> int:
        """Bytes of latent cache for one token of the main model, over all layers.

        Args:
            dtype: of the latent. "float8_e4m3fn": codes, one float32 scale per 128 channels, RoPE part BF16.
            mtp: add the MTP modules' own cache layers.
        """
        config = self.config
        layers = config.num_hidden_layers + ((config.num_nextn_predict_layers or 0) if mtp else 0)
        latent, rope, width = config.kv_lora_rank, config.qk_rope_head_dim, _width(dtype)
        if width == 1:
            return layers * (latent + 4 * -(-latent // 128) + 2 * rope)
        return layers * (latent + rope) * width

    def expanded_cache_bytes_per_token(self, dtype: Any = "bfloat16") -> int:
        """Bytes a token of the same model that cached its expanded keys and values (N + R and V a head)."""
        config = self.config
        per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return config.num_hidden_layers * config.num_attention_heads * per_head * _width(dtype)

    def grouped_query_cache_bytes_per_token(self, kv_heads: int, dtype: Any = "bfloat16") -> int:
        """Bytes a token with ordinary grouped-query attention: `kv_heads` keys and values of v_head_dim each."""
        config = self.config
        return config.num_hidden_layers * kv_heads * 2 * config.v_head_dim * _width(dtype)

    def flops_per_token(self, context: int, *, training: bool = False, causal: bool = True) -> float:
        """FLOPs of the main model for one token of a sequence of `context` tokens (multiply-add = 2).

        The head is counted, embedding look-up and MTP are not. Forward and backward together are 3 x forward.

        Args:
            context: sequence length in tokens.
            training: forward and backward instead of forward alone.
            causal: a token sees half of the sequence on average instead of all of it.
        """
        config = self.config
        per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        attention = 2 * config.num_attention_heads * per_head * context * config.num_hidden_layers
        forward = 2 * self.activated_parameters + attention * (0.5 if causal else 1.0)
        return forward * (3 if training else 1)

    def decode_flops_per_token(self, cached: int, *, absorbed: bool = True) -> float:
        """Forward FLOPs of one new token over `cached` tokens, absorbed or with the whole latent re-expanded."""
        config = self.config
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        if absorbed:
            return 2 * self.activated_parameters + layers * 2 * heads * (2 * latent + config.qk_rope_head_dim) * cached
        per_cached = 2 * heads * (nope + config.qk_rope_head_dim + value) + 2 * latent * heads * (nope + value)
        return 2 * self.activated_parameters + layers * per_cached * cached

    @property
    def _embedding_only(self) -> int:
        """Size of a table that serves as embedding and not as head; 0 where the two are tied."""
        return self.parts["embedding"] if "head" in self.parts else 0

    @cached_property
    def _mtp_stored(self) -> int:
        config, first = self.config, self.config.num_hidden_layers
        depths = range(config.num_nextn_predict_layers or 0)
        return sum(prod(s.shape) for depth in depths for s in layer_tensors(config, first + depth))

    @cached_property
    def _mtp_copies(self) -> int:
        return 2 * (self.config.num_nextn_predict_layers or 0) * self.config.vocab_size * self.config.hidden_size


def part_of(name: str) -> str:
    """The part of the main model, as `Account.parts` names it, that an official tensor belongs to."""
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if "norm" in name:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    marks = {".experts.": "routed_experts", ".shared_experts.": "shared_experts", ".gate.": "router"}
    return next((part for mark, part in marks.items() if mark in name), "dense_mlp")


def account(config: Any) -> Account:
    """The parameters, FLOPs and bytes of `config`, computed from shapes alone."""
    return Account(config)
