"""A decode step of a single token in plain torch."""

import torch.nn.functional as F

from . import experts, mla, norm, step


def _normed(x, before):
    return norm.rms_norm(x, before.weight, before.eps, None)[0]


def attention(
    x, weights, heads, softmax_scale, interleave, latent, rope, scale, cos, sin, slots, lengths, starts, window
):
    """See ``deepseek_v3.kernels.SingleAttention``."""
    before, q_a, q_norm, kv_a, kv_norm, q_b, kv_b, o = weights
    normed = _normed(x, before)
    new = (F.linear(normed, kv_a), *kv_norm, cos, sin, slots, interleave, scale)
    norm.write_latents(latent, rope, *new)
    query = F.linear(normed if q_a is None else _normed(F.linear(normed, q_a), q_norm), q_b)
    q_latent, q_rope = step.absorb_queries(query.view(1, 1, heads, -1), kv_b, cos, sin, interleave)
    mixed, _ = mla.mla_decode(q_latent, q_rope, latent, rope, softmax_scale, lengths, starts, scale, window)
    return x + F.linear(step.absorb_outputs(mixed, kv_b, o.shape[1] // heads).flatten(2), o)


def mlp(x, before, gate, up, down):
    """See ``deepseek_v3.kernels.SingleMLP``."""
    normed = _normed(x, before)
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def moe(x, before, router, gate_up, down, shared):
    """See ``deepseek_v3.kernels.SingleExperts``."""
    normed = _normed(x, before).flatten(0, 1)
    weight, *rest = router
    index, share = experts.route(F.linear(normed.float(), weight.float()), *rest)
    order, inverse, offsets = experts.sort_pairs(index, len(gate_up))
    gate, up = experts.grouped_gemm(experts.gather_rows(normed, order, router.top_k), gate_up, offsets, False).chunk(
        2, dim=-1
    )
    routed = experts.combine(experts.grouped_gemm(F.silu(gate) * up, down, offsets, False), inverse, offsets, share, 1)
    own_gate, own_up, own_down = shared
    own = F.linear(F.silu(F.linear(normed, own_gate)) * F.linear(normed, own_up), own_down)
    return x + (routed + own).view_as(x)
