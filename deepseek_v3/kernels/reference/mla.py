"""Absorbed multi-head latent attention over a cache of latents, in plain torch.

B batch, T query tokens, S cached tokens, H heads, C kv_lora_rank, R qk_rope_head_dim. All heads read one latent:
``logits = scale * (q_latent . latent + q_rope . rope)`` and ``out = softmax(logits) latent``.
"""

import torch

SCALE_GROUP = 128


def visible(queries, slots, lengths, starts, sliding_window, device):
    """Which cached slots each query token reads: bool [B or 1, T, S]."""
    slot = torch.arange(slots, device=device)
    end = torch.full((1,), slots, device=device) if lengths is None else lengths.to(device)
    # Query t is T - 1 - t tokens before the last one.
    end_BT = end[:, None] - torch.arange(queries - 1, -1, -1, device=device)
    mask = slot < end_BT[..., None]  # [B, T, S]
    if sliding_window is not None:
        mask = mask & (slot >= end_BT[..., None] - sliding_window)
    if starts is not None:
        mask = mask & (slot >= starts.to(device)[:, None, None])
    return mask


def mla_decode(q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window):
    """See ``deepseek_v3.kernels.mla_decode``; float32 arithmetic, float64 for float64 queries."""
    wide = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    mask = visible(q_latent.shape[1], latent.shape[1], lengths, starts, sliding_window, latent.device)
    # A slot that nobody reads may hold anything, and zero times NaN is NaN.
    dead = ~mask.any(dim=1)[..., None]  # [B or 1, S, 1]
    values = latent.to(wide)
    if latent_scale is not None:
        values = values * latent_scale.to(wide).repeat_interleave(SCALE_GROUP, -1)[..., : latent.shape[2]]
    values = values.masked_fill(dead, 0)  # [B, S, C]
    keys = rope.to(wide).masked_fill(dead, 0)  # [B, S, R]
    logits = torch.einsum("bthc,bsc->bths", q_latent.to(wide), values)
    logits = (logits + torch.einsum("bthr,bsr->bths", q_rope.to(wide), keys)) * scale
    logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)  # [B, T, H]
    weights = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0)[..., None])
    out = torch.einsum("bths,bsc->bthc", weights, values)
    return out.to(q_latent.dtype), lse.float()
