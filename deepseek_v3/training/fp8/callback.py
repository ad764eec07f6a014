"""Guard rails of FP8 training under Trainer: what E4M3 lost, in the logs; and a stop where numbers break."""

from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from .enable import fp8_modules


class FP8StatisticsCallback(TrainerCallback):
    """Logs what FP8 loses every `FP8Recipe.statistics_interval` steps, and ends the training at a loss that is no
    number.

    With the next training log come `fp8_activation_underflow` (share of numbers other than zero that became zero),
    `fp8_activation_overflow` and `fp8_activation_nan` (how many infinities and NaN; scales of the current values let
    nothing finite overflow), and the same for `gradient` and `weight`.

    Before each optimizer step the device is read, once: where a loss or any parameter's gradient is not finite, the
    step's batches run again with every module watched, and FloatingPointError names the first one whose output, or
    whose output's gradient, is not finite, or else a parameter with such a gradient. The weights are still those from
    before the step.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[tuple, dict[str, Any]]] = []
        self._losses: list[torch.Tensor] = []
        self._counts: dict[str, float] = {}
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        modules = fp8_modules(model)
        if not modules:
            raise ValueError(
                "FP8StatisticsCallback: the model is not in FP8 training; enable_fp8_training(model) first"
            )
        self._recipe, self._statistics = modules[0].fp8.recipe, modules[0].fp8.statistics
        self._forget()
        self._handle = model.register_forward_hook(self._remember, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._handle.remove()
        self._statistics.active = False
        self._forget()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interval = self._recipe.statistics_interval
        self._statistics.active = interval > 0 and state.global_step % interval == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        # All of them: clipping spreads a NaN to every gradient, but turns the others to zero where one is infinite.
        peaks = torch._foreach_norm(grads, float("inf")) if grads else []
        marks = [mark.float().sum() for mark in (*self._losses, *peaks)]
        if marks and not bool(torch.stack([mark.to(marks[0].device) for mark in marks]).isfinite().all()):
            self._handle.remove()
            where = next(filter(None, (first_broken(model, *b) for b in self._batches)), "the sum of the gradients")
            raise FloatingPointError(
                f"training stopped before optimizer step {state.global_step + 1}: not a finite number first in {where}"
            )
        self._forget()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._statistics.active:
            return
        self._statistics.active = False
        for kind, counts in self._statistics.drain().items():
            self._counts[f"fp8_{kind}_underflow"] = counts["underflow"] / max(1, counts["elements"])
            for name in ("overflow", "nan"):
                self._counts[f"fp8_{kind}_{name}"] = counts[name]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._counts and "loss" in (logs or {}):
            logs.update(self._counts)
            state.log_history[-1].update(self._counts)
            self._counts = {}

    def _remember(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        self._batches.append((args, kwargs))
        loss = output.get("loss") if hasattr(output, "get") else None
        if loss is not None:  # some trainers compute it from the logits
            self._losses.append(loss.detach())

    def _forget(self) -> None:
        self._batches, self._losses = [], []


def first_broken(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Run a batch again; which module first gives an output that is not finite, or gets such a gradient for it, or
    which parameter gets one."""
    found: list[str] = []

    def check(tensor: torch.Tensor, what: str) -> None:
        if not found and not bool(tensor.detach().isfinite().all()):
            found.append(what)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                return
            check(tensor, f"the output of {name}")
            if tensor.requires_grad and not found:
                tensor.register_hook(lambda grad: check(grad, f"the gradient to the output of {name}"))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.enable_grad():
            output = model(*args, **kwargs)
            loss = output.get("loss")
            loss = output["logits"].float().mean() if loss is None else loss
            check(loss, "the loss")
            if not found:
                learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
                grads = torch.autograd.grad(loss, list(learnt.values()), allow_unused=True)
                for name, grad in zip(learnt, grads, strict=True):
                    if grad is not None:
                        check(grad, f"the gradient of {name}")
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
