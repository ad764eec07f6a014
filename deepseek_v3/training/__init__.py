"""Training under transformers' Trainer: router balance, data, evaluation, the train command."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .balance import RouterBalanceCallback, update_router_bias
    from .fp8 import AdamWBF16, FP8Recipe, FP8StatisticsCallback, disable_fp8_training, enable_fp8_training
    from .lora import lora_target_modules

__all__ = [
    "AdamWBF16",
    "FP8Recipe",
    "FP8StatisticsCallback",
    "RouterBalanceCallback",
    "disable_fp8_training",
    "enable_fp8_training",
    "lora_target_modules",
    "update_router_bias",
]

_BALANCE = ("RouterBalanceCallback", "update_router_bias")


def __getattr__(name: str) -> Any:
    # transformers' callbacks import PEFT and whatever quantisers are installed: only who trains waits for them.
    if name in _BALANCE:
        from . import balance

        return getattr(balance, name)
    if name == "lora_target_modules":
        from .lora import lora_target_modules

        return lora_target_modules
    if name in __all__:
        from . import fp8

        return getattr(fp8, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
