"""What the models return beyond the transformers outputs."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class DeepseekV3ModelOutput(MoeModelOutputWithPast):
    """Adds to the base model's output:

    balance_loss: 0-d, the sequence-wise balance loss with its factor, summed over the MoE layers; where asked for.
    pre_norm_hidden_state: [B, T, D], the state before the final norm, where the MTP modules read that one.
    """

    balance_loss: torch.Tensor | None = None
    pre_norm_hidden_state: torch.Tensor | None = None


@dataclass
class DeepseekV3CausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds to the causal LM's output:

    main_loss: 0-d, next-token cross-entropy.
    mtp_loss: 0-d, mean over the MTP depths, before its weight.
    balance_loss: 0-d, with its factor; also under transformers' name `aux_loss`.
    mtp_logits: D tensors, depth k of shape [B, T - k, V].
    mtp_state: [B, T, D], the state that enters the first MTP module; where asked for.
    `loss` = main_loss + mtp_loss_weight * mtp_loss + balance_loss.
    """

    main_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    mtp_logits: tuple[torch.Tensor, ...] | None = None
    mtp_state: torch.Tensor | None = None
