"""Balancing without an auxiliary loss: after each optimizer step every router's selection bias moves by gamma.

The load is counted over the whole batch of the step: over gradient accumulation, because the routers add it up, and
over all ranks, because it is reduced here (report, section 2.1.2).

Letters: E routed experts.
"""

from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..modeling_deepseek_v3.moe import DeepseekV3TopkRouter


def routers_of(model: nn.Module) -> list[DeepseekV3TopkRouter]:
    """The routers of a model or of anything that wraps one, in the order of the layers, MTP modules last."""
    return [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float) -> list[torch.Tensor | None]:
    """bias += rate * sign(mean load - load) in every router, from the load counted since the last call.

    Every rank must call this; each sees the sum over all ranks and makes the same update.

    Args:
        model: anything that holds `DeepseekV3TopkRouter`s.
        rate: gamma; 0 counts without moving anything.

    Returns:
        Tokens per expert of each router, [E] float32 over all ranks; None for a router that saw no token anywhere.
    """
    loads: list[torch.Tensor | None] = []
    for router in routers_of(model):
        bias = router.e_score_correction_bias
        load = router.expert_load
        # A rank without tokens still takes part in the reduction.
        load = _all_reduce(torch.zeros_like(bias) if load is None else load.to(bias.device))
        router.expert_load = None
        seen = bool(load.sum() > 0)
        if seen and rate:
            bias.add_(torch.sign(load.mean() - load).to(bias.dtype), alpha=rate)
        loads.append(load if seen else None)
    return loads


class RouterBalanceCallback(TrainerCallback):
    """Moves the routers' biases after each optimizer step, and puts what they do into the logs.

    With each training log come `main_loss`, `mtp_loss` and `balance_loss` (means since the last log), and for the
    experts `max_vio` (largest load over the mean load, minus 1; averaged over the layers), `max_load` (largest load
    over the mean of any layer) and `bias_range` (largest minus smallest bias of any layer). The whole loads and
    biases, layer by layer, go to `state.log_history` as `expert_load` (shares that add up to 1) and `router_bias`.

    Args:
        update_rate: gamma. None takes `config.router_bias_update_rate`; 0 only watches. The report used 0.001 and 0
            for the last tokens.
    """

    def __init__(self, update_rate: float | None = None) -> None:
        if update_rate is not None and update_rate < 0:
            raise ValueError(f"update_rate = {update_rate}: the bias moves against the load; give 0 to switch it off")
        self.update_rate = update_rate
        self._loads: list[torch.Tensor | None] = []
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not routers_of(model):
            raise ValueError(f"RouterBalanceCallback: {type(model).__name__} has no DeepseekV3TopkRouter to balance")
        for router in routers_of(model):
            router.expert_load = None
        self._loads, self._steps = [], 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        rate = model.config.router_bias_update_rate if self.update_rate is None else self.update_rate
        loads = update_router_bias(model, rate)
        self._loads = [_add(old, new) for old, new in zip(self._loads or [None] * len(loads), loads, strict=True)]
        self._steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if not self._steps or "loss" not in (logs or {}):
            return
        scalars = {**self._mean_losses(model), **self._balance(model)}
        logs.update(scalars)
        state.log_history[-1].update(scalars)
        shares = [None if load is None else (load / load.sum()).tolist() for load in self._loads]
        state.log_history[-1]["expert_load"] = shares
        state.log_history[-1]["router_bias"] = [r.e_score_correction_bias.tolist() for r in routers_of(model)]
        self._loads, self._steps = [], 0

    def _mean_losses(self, model: nn.Module) -> dict[str, float]:
        language_model = next((m for m in model.modules() if isinstance(m, DeepseekV3ForCausalLM)), None)
        if language_model is None:
            return {}
        meter = language_model.loss_meter
        summed, means = meter.summed, meter.drain(self._steps)
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        # Shares of one sum over the whole batch add up over ranks; means are averaged.
        return {name: float(_all_reduce(value)) / (1 if summed else ranks) for name, value in means.items()}

    def _balance(self, model: nn.Module) -> dict[str, float]:
        ratios = [float(load.max() / load.mean()) for load in self._loads if load is not None]
        if not ratios:
            return {}
        ranges = [float(r.e_score_correction_bias.max() - r.e_score_correction_bias.min()) for r in routers_of(model)]
        return {"max_vio": sum(ratios) / len(ratios) - 1, "max_load": max(ratios), "bias_range": max(ranges)}


def _add(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    if old is None or new is None:
        return old if new is None else new
    return old + new
