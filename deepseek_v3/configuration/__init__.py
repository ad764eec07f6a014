"""Configuration, presets of published sizes, the official layout, and the accounting."""

from typing import TYPE_CHECKING, Any

from .accounting import Account, account
from .layout import TensorSpec, is_moe_layer, layer_tensors, official_tensors
from .presets import PRESETS, preset, recognise

if TYPE_CHECKING:
    from .configuration_deepseek_v3 import DeepseekV3Config, KimiK2Config

__all__ = [
    "PRESETS",
    "Account",
    "DeepseekV3Config",
    "KimiK2Config",
    "TensorSpec",
    "account",
    "is_moe_layer",
    "layer_tensors",
    "official_tensors",
    "preset",
    "recognise",
]


def __getattr__(name: str) -> Any:
    # The configuration classes need transformers, the rest of this folder needs nothing: import them on demand.
    if name in ("DeepseekV3Config", "KimiK2Config"):
        from . import configuration_deepseek_v3

        return getattr(configuration_deepseek_v3, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
