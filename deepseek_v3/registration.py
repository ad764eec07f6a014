"""Making transformers' Auto classes build this package's models, and taking that back."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    conversion_mapping,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration.configuration_deepseek_v3 import DeepseekV3Config, KimiK2Config
from .kernels import experts_forward
from .modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
)
from .modeling_deepseek_v3.checkpoint import register_converters
from .quantization import bnb_quantizer, quantizer

_CONFIGS = (DeepseekV3Config, KimiK2Config)
_MODELS: dict[Any, Any] = {
    AutoModel: DeepseekV3Model,
    AutoModelForCausalLM: DeepseekV3ForCausalLM,
    AutoModelForSequenceClassification: DeepseekV3ForSequenceClassification,
    AutoModelForTokenClassification: DeepseekV3ForTokenClassification,
}


def register() -> None:
    """Take over `model_type` "deepseek_v3" and add "kimi_k2" in this process. Done by `import deepseek_v3`."""
    for config in _CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, model in _MODELS.items():
            # The mapping itself, not `auto.register`: that one insists on a single config class for a model.
            auto._model_mapping.register(config, model, exist_ok=True)
    quantizer.register()
    bnb_quantizer.register()
    # For any transformers MoE of this layout: `experts_implementation="deepseek_v3"`.
    ALL_EXPERTS_FUNCTIONS.register("deepseek_v3", experts_forward)
    register_converters(tuple(config.model_type for config in _CONFIGS))


def unregister() -> None:
    """Give `model_type` "deepseek_v3" back to transformers' own classes; "kimi_k2" is unknown again."""
    quantizer.unregister()
    bnb_quantizer.unregister()
    for config in _CONFIGS:
        CONFIG_MAPPING._extra_content.pop(config.model_type, None)
        for auto in _MODELS:
            auto._model_mapping._extra_content.pop(config, None)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard(config.model_type)
    # Built again from transformers' own table at the next look-up, with what others have registered.
    others = {
        name: conversion_mapping.get_checkpoint_conversion_mapping(name)
        for name in conversion_mapping.USER_REGISTERED_MAPPINGS
    }
    conversion_mapping._checkpoint_conversion_mapping_cache = None
    for name, mapping in others.items():
        conversion_mapping.register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
