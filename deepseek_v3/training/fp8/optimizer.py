"""AdamW with its two moments in bfloat16 (DeepSeek-V3 report, section 3.3.3); arithmetic and weights in float32.

    Trainer(..., optimizer_cls_and_kwargs=(AdamWBF16, {"lr": 2.2e-4, "betas": (0.9, 0.95)}))

gives it the groups with and without weight decay that Trainer makes, with Trainer's weight_decay;
`optimizers=(AdamWBF16(model.parameters()), None)` hands in a finished one.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
# Numbers updated at once: what is widened to float32 for a step stays some hundred MiB.
BUCKET = 1 << 25


class AdamWBF16(Optimizer):
    """AdamW (decoupled weight decay) that keeps its moments in bfloat16, rounded to nearest.

    Memory is 4 bytes a parameter instead of 8. Parameters should be float32: one of bfloat16 loses every update below
    half of its last place. A state dict holds bfloat16 and resumes bit for bit.

    Args:
        params: parameters or groups of them. lr: learning rate. betas: decay of the two moments.
        eps: added to the square root of the second moment. weight_decay: times lr, taken off the weights.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if not 0 <= lr:
            raise ValueError(f"lr = {lr}: give 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas = {betas}: both must be at least 0 and below 1")
        if not 0 < eps or not 0 <= weight_decay:
            raise ValueError(f"eps = {eps} must be above 0 and weight_decay = {weight_decay} at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in _buckets([p for p in group["params"] if p.grad is not None]):
                self._update(bucket, group)
        return loss

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(p) for p in params]
        for state in states:
            state["step"] += 1
        grads = [p.grad.float() for p in params]  # type: ignore[union-attr]
        first = [state["exp_avg"].float() for state in states]
        second = [state["exp_avg_sq"].float() for state in states]
        (beta1, beta2), steps = group["betas"], [float(state["step"]) for state in states]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        for state, m, v in zip(states, first, second, strict=True):
            state["exp_avg"].copy_(m)
            state["exp_avg_sq"].copy_(v)
        # The step goes with what is kept of the moments' new values in float32: they are rounded once, at rest.
        torch._foreach_div_(second, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, group["eps"])
        torch._foreach_div_(first, second)
        torch._foreach_mul_(first, [-group["lr"] / (1 - beta1**step) for step in steps])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, first)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume. torch widens what it loads to the parameters' dtype; the moments are bfloat16 again after it."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].to(torch.bfloat16)


def _buckets(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters of one device in runs of about BUCKET numbers."""
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in params:
        if bucket and (size + parameter.numel() > BUCKET or parameter.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
