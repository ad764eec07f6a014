"""DeepSeek-V3 for Hugging Face: latent attention, DeepSeekMoE and Multi-Token Prediction behind the usual calls.

`import deepseek_v3` registers the classes with transformers' Auto classes for `model_type` "deepseek_v3" (in place of
transformers' own) and "kimi_k2"; `deepseek_v3.unregister()` gives the former back. Only the `deepseek-v3` command
leaves that to those of its subcommands that load models: looking at a checkpoint must not wait for transformers.
"""

import os
import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from .training import (
        FP8Recipe,
        RouterBalanceCallback,
        disable_fp8_training,
        enable_fp8_training,
        lora_target_modules,
    )

__version__ = "0.1.0"

_HOMES = {
    "DeepseekV3Config": "configuration",
    "DeepseekV3ForCausalLM": "modeling_deepseek_v3",
    "DeepseekV3ForSequenceClassification": "modeling_deepseek_v3",
    "DeepseekV3ForTokenClassification": "modeling_deepseek_v3",
    "DeepseekV3Model": "modeling_deepseek_v3",
    "DeepseekV3PreTrainedModel": "modeling_deepseek_v3",
    "FP8Config": "quantization",
    "FP8Recipe": "training",
    "KimiK2Config": "configuration",
    "LatentCache": "modeling_deepseek_v3",
    "RouterBalanceCallback": "training",
    "disable_fp8_training": "training",
    "enable_fp8_training": "training",
    "lora_target_modules": "training",
    "register": "registration",
    "unregister": "registration",
}

__all__ = [
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "FP8Config",
    "FP8Recipe",
    "KimiK2Config",
    "LatentCache",
    "RouterBalanceCallback",
    "disable_fp8_training",
    "enable_fp8_training",
    "lora_target_modules",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def _is_own_command() -> bool:
    """Whether this process was started as `deepseek-v3 ...` or `python -m deepseek_v3.cli ...`."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # Python is still looking for the module
        return "deepseek_v3.cli" in sys.orig_argv
    return PurePath(started).name in ("deepseek-v3", "deepseek-v3.exe")


# Tells the worker processes of such a command, which load no models either.
WITHOUT_MODELS = "DEEPSEEK_V3_WITHOUT_MODELS"
if _is_own_command():
    os.environ[WITHOUT_MODELS] = "1"
if WITHOUT_MODELS not in os.environ:
    from .registration import register

    register()
