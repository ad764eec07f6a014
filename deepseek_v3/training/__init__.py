"""Training under transformers' Trainer: router balance, data, evaluation, the train command."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .balance import RouterBalanceCallback, update_router_bias

__all__ = ["RouterBalanceCallback", "update_router_bias"]


def __getattr__(name: str) -> Any:
    # transformers' callbacks import PEFT and whatever quantisers are installed: only who trains waits for them.
    if name in __all__:
        from . import balance

        return getattr(balance, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
