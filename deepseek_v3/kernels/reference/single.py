"""A decode step of a single token in plain torch."""

import torch.nn.functional as F

from . import experts, mla, norm, step


def attention(
    x, gain, eps, q_a, q_gain, q_eps, kv_a, kv_gain, kv_eps, q_b, kv_b, o, heads, latent, rope, scale,
    cos, sin, slots, softmax_scale, lengths, starts, window, interleave,
):  # fmt: skip
    """See ``deepseek_v3.kernels.single_attention``."""
    normed = norm.rms_norm(x, gain, eps, None)[0]
    compressed, low = F.linear(normed, kv_a), normed if q_a is None else F.linear(normed, q_a)
    norm.write_latents(latent, rope, compressed, kv_gain, kv_eps, cos, sin, slots, interleave, scale)
    query = F.linear(low if q_a is None else norm.rms_norm(low, q_gain, q_eps, None)[0], q_b)
    absorbed = step.absorb_queries(query.view(1, 1, heads, -1), kv_b, cos, sin, interleave)
    mixed, _ = mla.mla_decode(*absorbed, latent, rope, softmax_scale, lengths, starts, scale, window)
    return x + F.linear(step.absorb_outputs(mixed, kv_b, o.shape[1] // heads).flatten(2), o)


def mlp(x, gain, eps, gate, up, down):
    """See ``deepseek_v3.kernels.single_mlp``."""
    normed = norm.rms_norm(x, gain, eps, None)[0]
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def chosen_experts(x, gate_up, down, index, share):
    """The sum over the token's experts [1, K], each times its share [1, K]; x [1, D]."""
    order, inverse, offsets = experts.sort_pairs(index, gate_up.shape[0])
    rows = experts.gather_rows(x, order, index.shape[1])
    gate, up = experts.grouped_gemm(rows, gate_up, offsets, False).chunk(2, dim=-1)
    y = experts.grouped_gemm(F.silu(gate) * up, down, offsets, False)
    return experts.combine(y, inverse, offsets, share, 1)


def moe(
    x, gain, eps, router, bias, groups, kept, top_k, normalise, scaling, gate_up, down, shared_gate, shared_up,
    shared_down,
):  # fmt: skip
    """See ``deepseek_v3.kernels.single_experts``."""
    normed = norm.rms_norm(x, gain, eps, None)[0].flatten(0, 1)
    logits = F.linear(normed.float(), router.float())
    index, share = experts.route(logits, bias, groups, kept, top_k, normalise, scaling)
    own = F.linear(F.silu(F.linear(normed, shared_gate)) * F.linear(normed, shared_up), shared_down)
    return x + (chosen_experts(normed, gate_up, down, index, share) + own).view_as(x)
