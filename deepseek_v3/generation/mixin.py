"""What `generate` does differently for latent attention and Multi-Token Prediction."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from ..modeling_deepseek_v3.cache import LatentCache
from .speculative import SpeculativeDecoder

# The depth that the `generate` call in progress was asked for, in a tuple, or None for plain decoding.
_ASKED: ContextVar[tuple[Any] | None] = ContextVar("mtp_depth", default=None)


class LatentGenerationMixin(GenerationMixin):
    """`generate` with a `LatentCache` where it would make a `DynamicCache`, which copies the history a token, and
    with the model's own MTP modules drafting under `use_mtp=True`."""

    config: Any

    def generate(self: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; `use_mtp=True` decodes speculatively, `num_assistant_tokens` drafts a step.

        Args:
            inputs, generation_config, kwargs: as of `GenerationMixin.generate`.
            use_mtp: draft with the model's MTP modules and verify the drafts in one forward: any batch size, padding
                side, greedy or sampling. Greedy output equals plain greedy output in the same dtype and attention
                form; where two logits are equal to rounding, a forward over several tokens may round otherwise than
                one over a single token, so ties can break differently in low precision. Sampled output has the
                distribution of plain sampling.
            num_assistant_tokens: drafts a step from 1 (the last module is run again on its own output beyond the
                model's number of modules), or "auto" to measure which depth is fastest; default one a module.
            cache_config: what `LatentCache` takes, for the cache that is made where none is given:
                `{"dtype": "float8_e4m3fn"}` keeps latents as E4M3 codes, `{"sliding_window": W}` lets each token see
                the last W, both together do both; with every `cache_implementation` but "quantized", which is
                transformers' own. A generation configuration keeps it, saved and loaded.

        Returns:
            Token ids [B, L], or with `return_dict_in_generate` an output whose `mtp` is a `MtpStatistics`.

        Raises:
            ValueError: a model without MTP modules, beams, or another strategy that drafts cannot serve; something
                else in cache_config.
        """
        base = generation_config if generation_config is not None else self.generation_config
        use_mtp = kwargs.pop("use_mtp", None)
        if use_mtp is None:
            use_mtp = getattr(base, "use_mtp", None)
        if not use_mtp:
            return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]
        depth = kwargs.pop("num_assistant_tokens", None)
        if depth is None and generation_config is not None:
            depth = generation_config.num_assistant_tokens
        _refuse_other_strategies(self, base, kwargs)
        asked = _ASKED.set((depth,))
        try:
            kwargs["use_mtp"] = False  # transformers' own drafting, which knows one row and one depth
            return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]
        finally:
            _ASKED.reset(asked)

    def _sample(self: Any, input_ids: Any, **prepared: Any) -> Any:  # type: ignore[override]
        """Greedy decoding and sampling, the two strategies that drafts serve, with everything prepared."""
        asked = _ASKED.get()
        if asked is not None:
            return _speculate(self, input_ids, asked[0], **prepared)
        cache, mask = prepared.get("past_key_values"), prepared.get("attention_mask")
        with replayed(self, cache, mask, prepared["generation_config"]):
            return super()._sample(input_ids, **prepared)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self: Any, input_ids: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; a step that a graph replays takes what its rows see instead of a mask.

        transformers reads off these arguments' names that prompts may be given as `inputs_embeds`.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]
        cache = inputs.get("past_key_values")
        graphs, tokens = getattr(cache, "graphs", None), inputs.get("input_ids")
        if graphs is not None and tokens is not None:
            spans = graphs.spans(cache, *tokens.shape)
            if spans is not None:
                inputs |= {"mla_spans": spans, "attention_mask": None}
        return inputs

    @staticmethod
    def create_masks_for_generate(config: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """The masks that transformers makes ahead of a forward over a fixed cache, with a `LatentCache`'s window."""
        if isinstance(past_key_values, LatentCache) and past_key_values.sliding_window is not None:
            config = copy.copy(config)
            config.sliding_window = past_key_values.sliding_window
        return create_masks_for_generate(config, past_key_values=past_key_values, **kwargs)

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: Any, *args: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        made = model_kwargs.get("past_key_values")
        if given is None and made is not None:
            model_kwargs["past_key_values"] = _latent_cache(self.config, made, generation_config, _ASKED.get())


@contextmanager
def replayed(model: Any, cache: Any, mask: torch.Tensor | None, generation_config: Any) -> Iterator[None]:
    """Within this context the decode steps over `cache` are replayed from CUDA graphs, where they can be captured.

    `generation_config.disable_compile` keeps them off, and so do hidden states or attentions that are asked for:
    a replay calls no module that could record them.
    """
    records = generation_config.output_hidden_states or generation_config.output_attentions
    usable = isinstance(cache, LatentCache) and (mask is None or mask.dim() == 2)
    if not usable or records or generation_config.disable_compile:
        yield
        return
    cache.expect(generation_config.max_length or 0)
    cache.graphs = model.base_model.decode_graphs(cache, None if mask is None else mask.bool())
    try:
        yield
    finally:
        cache.graphs = None


def _refuse_other_strategies(model: Any, base: Any, kwargs: dict[str, Any]) -> None:
    def asked(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(base, name, None) if value is None else value

    if not getattr(model.config, "num_nextn_predict_layers", 0):
        raise ValueError(
            "use_mtp: the model has no MTP module (config.num_nextn_predict_layers = 0). Load a checkpoint that holds "
            "one, or train one with num_nextn_predict_layers >= 1"
        )
    if (asked("num_beams") or 1) > 1 or (asked("num_beam_groups") or 1) > 1:
        raise ValueError("use_mtp works with greedy decoding and sampling, not with num_beams > 1")
    if asked("penalty_alpha"):
        raise ValueError(
            "use_mtp works with greedy decoding and sampling, not with contrastive search (penalty_alpha)"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "dola_layers"):
        if asked(name) is not None:
            raise ValueError(f"use_mtp drafts with the model's own MTP modules and cannot be combined with {name}")
    if asked("use_cache") is False:
        raise ValueError("use_mtp needs the cache; leave use_cache on")
    if asked("output_attentions"):
        raise ValueError("use_mtp returns scores, logits and hidden states, but no attentions; leave them off")


def _speculate(
    model: Any,
    input_ids: torch.Tensor,
    depth: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The decoding method that `generate` calls with everything prepared."""
    if synced_gpus:
        raise ValueError("use_mtp does not run under ZeRO-3, where ranks must take the same number of steps")
    cache = past_key_values
    if not isinstance(cache, LatentCache):
        raise ValueError(
            f"use_mtp needs a LatentCache, whose rows may differ in length, not a {type(cache).__name__}. "
            "Leave past_key_values out, or pass deepseek_v3.LatentCache(model.config)"
        )
    past, embeds = int(cache.get_seq_length()), inputs_embeds
    if embeds is not None:
        embeds = embeds[:, past:] if embeds.shape[1] > past else embeds
    new = (input_ids.shape[1] - past) if embeds is None else embeds.shape[1]
    if new < 1:
        raise ValueError(
            f"the cache already holds {past} tokens and the input has {input_ids.shape[1]}: pass the whole "
            "conversation with at least one token that the cache has not seen"
        )
    slots = past + new
    if attention_mask is None:
        attention_mask = torch.ones((len(input_ids), slots), device=input_ids.device, dtype=torch.long)
    mask = attention_mask.bool()
    if not bool(mask[:, past:].any(dim=1).all()):
        raise ValueError("a row of the batch holds nothing but padding; give every row at least one token")
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if position_ids is not None:
        own = position_ids.expand(len(input_ids), -1)[:, -new:]
        positions = torch.cat((positions[:, :past], own), dim=1)
    made_here = getattr(cache, "_is_user_defined", False) is False
    keep_cache = generation_config.return_dict_in_generate or not made_here
    with torch.no_grad(), replayed(model, cache, attention_mask, generation_config):
        return SpeculativeDecoder(
            model,
            input_ids,
            embeds,
            mask,
            positions,
            cache,
            logits_processor,
            stopping_criteria,
            generation_config,
            depth,
            streamer,
            keep_cache,
        ).run()


def _latent_cache(config: Any, made: Any, generation_config: Any, asked: tuple[Any] | None) -> Any:
    """The `LatentCache` that stands for the cache which transformers made, of the kind that `cache_config` names.

    A fixed one is transformers' own unless it is asked for more: a kind, or room for drafts that are thrown away.
    """
    if isinstance(made, QuantizedCache):
        return made
    kind = dict(generation_config.cache_config or {})
    unknown = kind.keys() - {"dtype", "sliding_window"}
    if unknown:
        raise ValueError(f"cache_config holds {min(unknown)!r}: a LatentCache takes dtype and sliding_window")
    if type(made) is DynamicCache:
        return LatentCache(config, offloading=made.offloading, **kind)
    if isinstance(made, StaticCache) and (kind or asked is not None):
        depth = 0 if asked is None else asked[0] if isinstance(asked[0], int) else 8
        spare = 0 if asked is None else 16 + 2 * depth
        return LatentCache(config, made.get_max_length() + spare, made.offloading, **kind)
    return made
