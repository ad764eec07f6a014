"""RMSNorm and the SwiGLU MLP, with the checkpoint's parameter names.

Letters: D hidden, F inner width.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..kernels import is_silu, rms_norm, swiglu


def on_kernels(x: torch.Tensor) -> bool:
    """Whether fused forward kernels serve `x`: on a GPU, where no gradient is wanted and no compiler fuses."""
    return x.is_cuda and not torch.is_grad_enabled() and not is_torchdynamo_compiling()


def is_bare(module: nn.Module, kind: type) -> bool:
    """Whether `module` may be read as its weights: it is a `kind` itself, and nothing wraps, hooks or moves it."""
    own = module.__dict__
    return (
        type(module) is kind
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and "forward" not in own  # accelerate puts its own there
        and all(type(parameter) is nn.Parameter for parameter in own["_parameters"].values() if parameter is not None)
    )


class DeepseekV3RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32, weight only."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if on_kernels(hidden_states):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[return-value]
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class DeepseekV3MLP(nn.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`: the dense MLP, and the shared experts as one wider MLP."""

    def __init__(self, config, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def lends_weights(self) -> bool:
        """Whether the three matrices may be read instead of calling this."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return is_bare(self, DeepseekV3MLP) and all(is_bare(linear, nn.Linear) for linear in linears)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        fused = on_kernels(gate) and is_silu(self.act_fn) and gate.dtype == up.dtype
        return self.down_proj(swiglu(gate, up) if fused else self.act_fn(gate) * up)
