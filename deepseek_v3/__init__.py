"""DeepSeek-V3 for Hugging Face: latent attention, DeepSeekMoE and Multi-Token Prediction behind the usual calls.

`import deepseek_v3` registers the classes with transformers' Auto classes for `model_type` "deepseek_v3" (in place of
transformers' own) and "kimi_k2"; `deepseek_v3.unregister()` gives the former back.
"""

from typing import TYPE_CHECKING, Any

from .configuration.configuration_deepseek_v3 import DeepseekV3Config, KimiK2Config
from .modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
    LatentCache,
)
from .quantization import FP8Config
from .registration import register, unregister

if TYPE_CHECKING:
    from .training import RouterBalanceCallback

__version__ = "0.1.0"

__all__ = [
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "FP8Config",
    "KimiK2Config",
    "LatentCache",
    "RouterBalanceCallback",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    # transformers' callbacks import PEFT and whatever quantisers are installed: only who trains waits for them.
    if name == "RouterBalanceCallback":
        from .training import RouterBalanceCallback

        return RouterBalanceCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
