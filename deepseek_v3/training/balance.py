"""Balancing without an auxiliary loss: after each optimizer step every router's selection bias moves by gamma.

The load is counted over the whole batch of the step: over gradient accumulation, because the routers add it up, and
over all ranks, because it is reduced here (report, section 2.1.2). The biases are buffers, which an adapter's files
do not hold: they go into the Trainer's own state, and beside a finished adapter into a file of their own.

Letters: E routed experts.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..modeling_deepseek_v3.moe import DeepseekV3TopkRouter
from .checks import check_dtypes, check_in_memory, check_sharding


def routers_of(model: nn.Module) -> list[DeepseekV3TopkRouter]:
    """The routers of a model or of anything that wraps one, in the order of the layers, MTP modules last."""
    return [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float) -> list[torch.Tensor]:
    """bias += rate * sign(mean load - load) in every router, from the load counted since the last call.

    Every rank must call this; each sees the sum over all ranks and makes the same update. Nothing is read back from
    the device: a router that saw no token has a load of zeros, whose sign moves nothing.

    Args:
        model: anything that holds `DeepseekV3TopkRouter`s.
        rate: gamma; 0 counts without moving anything.

    Returns:
        Tokens per expert of each router, [E] float32 over all ranks.
    """
    loads: list[torch.Tensor] = []
    for router in routers_of(model):
        bias = router.e_score_correction_bias
        load = router.expert_load
        # A rank without tokens still takes part in the reduction.
        load = _all_reduce(torch.zeros_like(bias) if load is None else load.to(bias.device))
        router.expert_load = None
        if rate:
            bias.add_(torch.sign(load.mean() - load).to(bias.dtype), alpha=rate)
        loads.append(load)
    return loads


ROUTER_BIAS_FILE = "router_bias.safetensors"


def save_router_bias(model: nn.Module, folder: str | Path) -> None:
    """Write every router's bias, [E] float32, to `router_bias.safetensors` of an adapter's folder."""
    biases = {str(i): r.e_score_correction_bias.detach().cpu() for i, r in enumerate(routers_of(model))}
    save_file(biases, Path(folder, ROUTER_BIAS_FILE))


def load_router_bias(model: nn.Module, folder: str | Path) -> None:
    """Put the biases that `save_router_bias` wrote into the model that the adapter goes over.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: they are of another model.
    """
    path = Path(folder, ROUTER_BIAS_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the routers' biases were not moved with this adapter")
    biases = load_file(path)
    _set_biases(model, [biases[name] for name in sorted(biases, key=int)], str(path))


@torch.no_grad()
def _set_biases(model: nn.Module, biases: list[Any], source: str) -> None:
    routers = routers_of(model)
    if [len(bias) for bias in biases] != [router.num_experts for router in routers]:
        raise ValueError(
            f"{source} holds the biases of {len(biases)} routers, which do not fit the {len(routers)} of this model. "
            "Take the base model that the adapter was trained over"
        )
    for router, bias in zip(routers, biases, strict=True):
        router.e_score_correction_bias.copy_(torch.as_tensor(bias, dtype=torch.float32))


class RouterBalanceCallback(TrainerCallback, ExportableState):
    """Moves the routers' biases after each optimizer step, and puts what they do into the logs.

    With each training log come `main_loss`, `mtp_loss` and `balance_loss` (means since the last log), and for the
    experts `max_vio` (largest load over the mean load, minus 1; averaged over the layers), `max_load` (largest load
    over the mean of any layer) and `bias_range` (largest minus smallest bias of any layer). The whole loads and
    biases, layer by layer, go to `state.log_history` as `expert_load` (shares that add up to 1) and `router_bias`.
    The biases are kept in every checkpoint's trainer_state.json and come back on resuming, also where the checkpoint
    holds nothing but an adapter.

    Args:
        update_rate: gamma. None takes `config.router_bias_update_rate`; 0 only watches. The report used 0.001 and 0
            for the last tokens.
    """

    def __init__(self, update_rate: float | None = None) -> None:
        if update_rate is not None and update_rate < 0:
            raise ValueError(f"update_rate = {update_rate}: the bias moves against the load; give 0 to switch it off")
        self.update_rate = update_rate
        self.router_bias: list[list[float]] | None = None
        self._routers: list[DeepseekV3TopkRouter] = []
        self._loads: list[torch.Tensor] = []
        self._steps = 0

    def state(self) -> dict[str, Any]:
        """What Trainer writes into its checkpoints: the biases of every router, in the order of `routers_of`."""
        biases = [router.e_score_correction_bias.tolist() for router in self._routers]
        return {"args": {"update_rate": self.update_rate}, "attributes": {"router_bias": biases or None}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not routers_of(model):
            raise ValueError(f"RouterBalanceCallback: {type(model).__name__} has no DeepseekV3TopkRouter to balance")
        check_in_memory(model)
        check_sharding(model, args)
        if not (args.bf16 or args.fp16):
            check_dtypes(model)
        self._routers = routers_of(model)
        for router in self._routers:
            router.expert_load = None
        self._resume(state, model)
        self._loads, self._steps = [], 0

    def _resume(self, state: Any, model: Any) -> None:
        if not state.global_step:
            return  # what the state holds now is of whatever model this callback saw before
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        kept = kept[0] if isinstance(kept, list) else kept
        biases = kept.get("attributes", {}).get("router_bias")
        if biases is not None:
            _set_biases(model, biases, "trainer_state.json")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        rate = model.config.router_bias_update_rate if self.update_rate is None else self.update_rate
        loads = update_router_bias(model, rate)
        self._loads = [a + b for a, b in zip(self._loads, loads, strict=True)] if self._loads else loads
        self._steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if not self._steps or "loss" not in (logs or {}):
            return
        scalars = {**self._mean_losses(model), **self._balance(model)}
        logs.update(scalars)
        state.log_history[-1].update(scalars)
        shares = [(load / load.sum()).tolist() if load.any() else None for load in self._loads]
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
        ratios = [float(load.max() / load.mean()) for load in self._loads if load.any()]
        if not ratios:
            return {}
        ranges = [float(r.e_score_correction_bias.max() - r.e_score_correction_bias.min()) for r in routers_of(model)]
        return {"max_vio": sum(ratios) / len(ratios) - 1, "max_load": max(ratios), "bias_range": max(ranges)}
