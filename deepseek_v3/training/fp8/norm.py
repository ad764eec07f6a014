"""RMSNorm that keeps its input alone for the backward (DeepSeek-V3 report, section 3.2.3)."""

import torch

from ...kernels import joined_rms_norm
from ...modeling_deepseek_v3.layers import DeepseekV3RMSNorm
from .state import FP8Module


class FP8TrainingRMSNorm(FP8Module, DeepseekV3RMSNorm):
    """RMSNorm, computed again in the backward where the recipe says so; never in FP8."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[.., D] to [.., D]."""
        if not self.training:
            return super().forward(hidden_states)
        return joined_rms_norm(hidden_states, None, self.weight, self.variance_epsilon)[0]
