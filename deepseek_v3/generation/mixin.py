"""What `generate` does differently for latent attention."""

from typing import Any

from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin

from ..modeling_deepseek_v3.cache import LatentCache


class LatentGenerationMixin(GenerationMixin):
    """`generate` with a `LatentCache` where it would make a `DynamicCache`, which copies the history a token."""

    config: Any

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: Any, *args: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        made = model_kwargs.get("past_key_values")
        if given is None and type(made) is DynamicCache:
            model_kwargs["past_key_values"] = LatentCache(self.config, offloading=made.offloading)
