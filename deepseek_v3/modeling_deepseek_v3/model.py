"""The base model: embedding, decoder layers, final norm; the MTP modules are its last layers.

Letters: B batch, T tokens, S cached tokens, D hidden.
"""

import copy
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_deepseek_v3 import DeepseekV3Config
from .attention import DeepseekV3Attention, Spans, choose_form, spans_of, step_spans
from .cache import LatentCache, check_cache
from .checkpoint import LoadingMixin
from .decoder import DeepseekV3DecoderLayer, DeepseekV3MTPLayer
from .graphs import MOST_TOKENS, DecodeGraphs, make_graphs
from .layers import DeepseekV3RMSNorm, on_kernels
from .moe import DeepseekV3Experts, DeepseekV3MoE, DeepseekV3TopkRouter
from .outputs import DeepseekV3ModelOutput
from .rope import DeepseekV3RotaryEmbedding

logger = logging.get_logger(__name__)


class DeepseekV3PreTrainedModel(LoadingMixin, PreTrainedModel):
    """Initialisation, and what transformers wants to know of the architecture."""

    config: DeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": DeepseekV3DecoderLayer,
        "attentions": DeepseekV3Attention,
        "router_logits": OutputRecorder(DeepseekV3TopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # The MTP modules' copies of embedding and head are the main model's own.
    _keys_to_ignore_on_load_unexpected = [
        r"layers\.\d+\.embed_tokens\.weight",
        r"layers\.\d+\.shared_head\.head\.weight",
    ]

    # transformers reads these two off the source of a model's own file, where ours has neither.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Ours where nothing is asked for and a GPU is there; else what transformers would take."""
        if requested_experts is None and torch.cuda.is_available():
            requested_experts = "deepseek_v3"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekV3TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekV3Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class DeepseekV3Model(DeepseekV3PreTrainedModel):
    """The decoder without a head. `layers[:num_hidden_layers]` are the main model, the rest its MTP modules."""

    def __init__(self, config: DeepseekV3Config) -> None:
        config.check()
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        main, depths = config.num_hidden_layers, config.num_nextn_predict_layers or 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers: list[nn.Module] = [DeepseekV3DecoderLayer(config, index) for index in range(main)]
        layers += [DeepseekV3MTPLayer(config, main + depth) for depth in range(depths)]
        self.layers = nn.ModuleList(layers)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def mtp_layers(self) -> list[DeepseekV3MTPLayer]:
        """The MTP modules, depth 1 first; empty where the model has none."""
        return list(islice(self.layers, self.config.num_hidden_layers, None))  # type: ignore[arg-type]

    def routers(self) -> dict[int, DeepseekV3TopkRouter]:
        """Router by layer index, MTP modules included."""
        moe = ((index, layer.mlp) for index, layer in enumerate(self.layers))
        return {index: mlp.router for index, mlp in moe if isinstance(mlp, DeepseekV3MoE)}

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        router_statistics: bool = False,
        token_mask: torch.Tensor | None = None,
        mla_form: str | None = None,
        mla_spans: Spans | None = None,
        **kwargs: Any,
    ) -> DeepseekV3ModelOutput:
        """Run the main layers.

        Args:
            input_ids: [B, T], or `inputs_embeds` [B, T, D] instead.
            attention_mask: [B, S + T] with 0 for padding (either side), or a ready [B, 1, T, S + T] mask.
            position_ids: [B, T] or [1, T]; restarts mark packed documents where no mask and no cache is given.
            past_key_values: any transformers cache; a `LatentCache` is made where `use_cache` and none is given.
            use_cache: return a cache.
            router_statistics: return the balance loss; in training it and the experts' load are always computed.
            token_mask: [B, T], True for what is no padding, which balance loss and load do not count. For packed rows,
                which carry no `attention_mask`; with a 2-D one it need not be given.
            mla_form: "expanded" or "absorbed" for this forward; None leaves it to `config.mla_form`.
            mla_spans: what the new tokens see and where they go, instead of a mask: `generate`'s steps, which
                `past_key_values.graphs` replays.

        Raises:
            ValueError: both or none of the inputs, an empty input, token ids outside of the vocabulary, position_ids
                of the wrong shape, a cache of another model or batch size.
        """
        embeds = self._embed(input_ids, inputs_embeds)
        batch, length = embeds.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = LatentCache(self.config)
        seen = 0
        if past_key_values is not None:
            check_cache(past_key_values, self.config, batch)
            seen = past_key_values.get_seq_length()
        positions = self._positions(position_ids, batch, length, seen, embeds.device)
        if mla_spans is not None:
            hidden_states, balance_loss = self._step(embeds, positions, past_key_values, mla_spans), None
        else:
            counted = positions if position_ids is None else None
            given = (embeds, attention_mask, positions, past_key_values)
            form, mask, spans = self.mask(*given, form=mla_form, counted=counted)
            hidden_states, balance_loss = self.run_layers(
                embeds,
                wanted=router_statistics or self.training,
                token_mask=_token_mask(attention_mask, length) if token_mask is None else token_mask,
                position_embeddings=self.rotary_emb(embeds, positions),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                mla_form=form,
                mla_spans=spans,
                **kwargs,
            )
        keep_pre_norm = self.mtp_layers and self.config.mtp_hidden_state == "pre_norm"
        return DeepseekV3ModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            balance_loss=balance_loss,
            pre_norm_hidden_state=hidden_states if keep_pre_norm else None,
        )

    def decode_graphs(self, cache: Any, mask: torch.Tensor | None) -> DecodeGraphs | None:
        """See `make_graphs`: for `generate`, which sets them as the cache's `graphs` for as long as it runs."""
        return make_graphs(self, cache, mask)

    def _step(self, embeds: torch.Tensor, positions: torch.Tensor, cache: Any, spans: Spans) -> torch.Tensor:
        """The main layers over a few new tokens [B, T, D] of a decode step, replayed from a graph."""

        def layers(
            embeds: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor | None
        ) -> torch.Tensor:
            angles = self.rotary_emb(embeds, positions)
            spans = step_spans(slots, starts, given)
            kwargs = {"position_embeddings": angles, "mla_form": "absorbed", "mla_spans": spans}
            return self.run_layers(embeds, False, None, past_key_values=cache, **kwargs)[0]

        given, extension = spans, spans.extension
        assert extension is not None
        written = cache.layers[: self.config.num_hidden_layers]
        where = (extension.slots, spans.starts)
        return cache.graphs.run("main", written, extension.extent, layers, (embeds, positions, *where))

    def run_layers(
        self, hidden_states: torch.Tensor, wanted: bool, token_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The main layers one after another: [B, T, D] to [B, T, D], and the sum of their balance losses if wanted.

        The experts' load is counted here, outside of what activation checkpointing runs twice.
        """
        total = None
        for layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(hidden_states, router_statistics=wanted, token_mask=token_mask, **kwargs)
            if wanted:
                hidden_states, balance_loss, load = hidden_states
                if load is not None:
                    total = balance_loss if total is None else total + balance_loss.to(total.device)
                    if self.training:
                        layer.mlp.router.count(load)
        return hidden_states, total

    def mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
        layer_idx: int = 0,
        form: str | None = None,
        counted: torch.Tensor | None = None,
    ) -> tuple[str, Any, Spans | None]:
        """The form of attention for this forward, the mask that it takes, and where the decode kernel serves it, what
        the mask shows. counted: as of `LatentCache.extension`; `position_ids` then says nothing of documents."""
        length = inputs_embeds.shape[1]
        keys, first = length, 0
        if past_key_values is not None:
            keys, first = past_key_values.get_mask_sizes(length, layer_idx)
        window = _window(past_key_values, attention_mask, length, keys)
        form = form or choose_form(self.config, length, keys, past_key_values is not None)
        few = form == "absorbed" and length <= MOST_TOKENS
        few = few and on_kernels(inputs_embeds) and self.config._attn_implementation != "eager"
        grows = isinstance(past_key_values, LatentCache) and past_key_values.max_cache_len is None
        if few and grows and attention_mask is None and length == 1:
            place = past_key_values.extension(len(inputs_embeds), 1, layer_idx, inputs_embeds.dtype, counted)
            return form, None, Spans(None, None, place)
        if form == "absorbed" and not few and grows and attention_mask is None and window is None and keys > length:
            return form, _lower_right(length, keys, inputs_embeds.device), None
        config: Any = self.config
        if form == "absorbed" or window is not None:
            config = copy.copy(config)
        if window is not None:
            config.sliding_window = window
        if form == "absorbed":
            # Whatever the back end, the absorbed form takes the boolean mask that SDPA takes.
            config._attn_implementation = "sdpa"
        fresh = past_key_values is not None and not isinstance(keys, torch.Tensor) and keys == length and first == 0
        mask = (create_causal_mask if window is None else create_sliding_window_causal_mask)(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            # An empty cache changes no mask, and without one transformers recognises packed documents by the
            # positions, which it reads back from the device: only those that the caller gave.
            past_key_values=None if fresh else past_key_values,
            position_ids=position_ids if counted is None else None,
            layer_idx=layer_idx,
        )
        spans = None
        if few:
            spans = spans_of(mask, length, window)  # type: ignore[arg-type]
        if spans is not None and isinstance(past_key_values, LatentCache):
            place = past_key_values.extension(inputs_embeds.shape[0], length, layer_idx, inputs_embeds.dtype)
            spans = spans._replace(extension=place)
        return form, mask, spans

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        given: torch.Tensor = inputs_embeds if input_ids is None else input_ids  # type: ignore[assignment]
        if given.shape[1] == 0:
            raise ValueError("the input holds no token; give a prompt of at least one token (the BOS token, say)")
        if input_ids is None:
            return given
        if input_ids.device.type == "cpu" and not is_torchdynamo_compiling():
            low, high = input_ids.aminmax()
            if low < 0 or high >= self.embed_tokens.num_embeddings:
                raise ValueError(
                    f"input_ids hold {int(low if low < 0 else high)}, outside of the vocabulary "
                    f"[0, {self.embed_tokens.num_embeddings}). Check the tokenizer against config.vocab_size"
                )
        return self.embed_tokens(input_ids)

    def _positions(
        self, position_ids: torch.Tensor | None, batch: int, length: int, seen: Any, device: torch.device
    ) -> torch.Tensor:
        limit = self.config.max_position_embeddings
        extended = (self.config.rope_parameters or {})["rope_type"] != "default"
        if not extended and isinstance(seen, int) and seen + length > limit and not is_torchdynamo_compiling():
            logger.warning_once(
                f"{seen + length} tokens exceed max_position_embeddings = {limit} and the config names no RoPE "
                "scaling: attention beyond that length is untrained. Shorten the input, or set rope_scaling (YaRN)"
            )
        if position_ids is None:
            if isinstance(seen, int):
                return torch.arange(seen, seen + length, device=device).unsqueeze(0)
            return (torch.arange(length, device=device) + seen).unsqueeze(0)
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}; the input of {batch} sequences of {length} "
                f"tokens takes [{batch}, {length}] or [1, {length}]"
            )
        return position_ids


def _lower_right(queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """[1, 1, T, S] for the newest T of S tokens, each of which sees itself and all before; None where one sees all."""
    if queries == 1:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def _window(cache: Any, attention_mask: Any, queries: int, keys: Any) -> int | None:
    """The sliding window that a mask of `queries` x `keys` must show; None where what is shown is all to be seen.

    Raises:
        ValueError: a ready mask that is made for other slots than a cache with a window shows.
    """
    window = cache.sliding_window if isinstance(cache, LatentCache) else None
    if window is None:
        return None
    ready = attention_mask is not None and attention_mask.dim() == 4
    if ready and not cache.has_rows and attention_mask.shape[-1] != keys:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: a cache with sliding_window = {window} shows "
            f"{queries} new tokens its last {keys} slots; pass [batch, 1, {queries}, {keys}], or [batch, tokens]"
        )
    return None if queries == 1 and cache.max_cache_len is None else window


def _token_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """[B, T], True for the tokens that are no padding; None where a mask does not tell."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -length:].bool()
