"""Training under transformers' Trainer: router balance, data, evaluation, the train command."""

from .balance import RouterBalanceCallback, update_router_bias

__all__ = ["RouterBalanceCallback", "update_router_bias"]
