"""Rotary embedding of the decoupled key part, interleaved or half-split, and YaRN's softmax correction.

Special about it: DeepSeek rotates interleaved pairs (x0, x1), (x2, x3), ...; the rotated result is laid out as
[evens | odds], the same permutation for queries and keys, so their products are unchanged.

Letters: B batch, H heads, T tokens, R qk_rope_head_dim.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from ..kernels import rope_angles
from .layers import on_kernels


class DeepseekV3RotaryEmbedding(nn.Module):
    """cos and sin of the positions' angles, [B, T, R] in the dtype of `x`, every RoPE type of transformers."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Any, device: Any = None, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """theta^(-2j / R) for j = 0 .. R/2 - 1, and the factor 1 for cos and sin."""
        dim = config.qk_rope_head_dim
        exponent = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grows = "dynamic" in self.rope_type or self.rope_type == "longrope"
        return self._updated(x, position_ids) if grows else self._angles(x, position_ids)

    @torch.no_grad()
    @dynamic_rope_update
    def _updated(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._angles(x, position_ids)

    def _angles(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if on_kernels(x):
            return rope_angles(position_ids, self.inv_freq, self.attention_scaling, x.dtype)
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)  # [B, T, R]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def softmax_scale(config: Any) -> float:
    """(N + R)^-0.5, times mscale^2 under YaRN: the correction that acts on the whole logit, nope and rope alike."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_parameters
    if rope.get("rope_type") != "yarn" or not rope.get("mscale_all_dim") or rope["factor"] <= 1:
        return scale
    mscale = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    return scale * mscale * mscale


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Rotate the last dimension of `x` by the positions' angles.

    Args:
        x: [B, H, T, R].
        cos, sin: [B, T, R], each half holding the same R/2 angles.
        interleave: pairs are (x0, x1), (x2, x3), ... instead of (x_j, x_{j + R/2}).

    Returns:
        [B, H, T, R], laid out [first of each pair | second of each pair].
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., :half], x[..., half:])
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
