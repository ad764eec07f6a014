"""The three products of FP8 training against float64 on the same quantised operands, written here."""

import copy

import pytest
import torch
from torch import nn

from deepseek_v3 import DeepseekV3Config
from deepseek_v3.modeling_deepseek_v3.decoder import DeepseekV3DecoderLayer
from deepseek_v3.modeling_deepseek_v3.rope import DeepseekV3RotaryEmbedding
from deepseek_v3.training import FP8Recipe, enable_fp8_training

SHAPE = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128}
SHAPE |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
SHAPE |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 128, "kv_lora_rank": 128}
SHAPE |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}


def layer(index, recipe=None, seed=0, dtype=torch.float32, std=None, **overrides):
    """A decoder layer with weights of usual size: dense (0) or with experts (1); converted where a recipe is given."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(**SHAPE | overrides)
    config._attn_implementation = "sdpa"
    block = DeepseekV3DecoderLayer(config, index)
    for parameter in block.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std or parameter.shape[-1] ** -0.5)
    if index:
        # Choices that rounding does not move: what is compared is arithmetic.
        block.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-3, 3, 8))
    block = block.to(dtype).train()
    block.rotary = DeepseekV3RotaryEmbedding(config)
    return block if recipe is None else enable_fp8_training(block, recipe)


def gradients(block, x, dy):
    x = x.clone().requires_grad_()
    positions = block.rotary(x, torch.arange(x.shape[1])[None])
    out = block(x, position_embeddings=positions)
    out.backward(dy)
    return {"output": out.detach(), "input": x.grad, **{n: p.grad for n, p in block.named_parameters()}}


def quantised(x, rows, columns, scale_fmt):
    """float64 values of x [R, C] after E4M3 rounding under one scale for each rows x columns tile."""
    r, c = x.shape
    padded = nn.functional.pad(x, (0, -c % columns, 0, -r % rows)).double()
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = (tiles.abs().amax((1, 3), keepdim=True).float() / 448).clamp(min=2.0**-126)
    if scale_fmt == "ue8m0":
        scale = 2.0 ** torch.ceil(torch.log2(scale.double())).float()
    codes = (tiles.float() / scale).to(torch.float8_e4m3fn)
    return (codes.double() * scale.double()).view_as(padded)[:r, :c]


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("tokens", [256, 200])
def test_products_match_float64_on_the_same_operands(outliers, scale_fmt, tokens):
    """To twice what float32 accumulation of those operands gives."""
    recipe = FP8Recipe(scale_fmt=scale_fmt, attention_output="input_dtype")
    linear = layer(0, recipe).mlp.down_proj  # [256, 384]
    x, dy = torch.randn(tokens, 384), torch.randn(tokens, 256)
    if outliers:
        x[:, 5] *= 1000
        dy[:, 7] *= 1000
    x.requires_grad_()
    out = linear(x)
    out.backward(dy)

    def tiled(tensor, rows, columns):
        return quantised(tensor.detach(), rows, columns, scale_fmt)

    x8, w8, dy8 = tiled(x, 1, 128), tiled(linear.weight, 128, 128), tiled(dy, 1, 128)
    x8_t, dy8_t = tiled(x8.float(), 128, 1), tiled(dy, 128, 1)
    for name, got, left, right in (
        ("Fprop", out, x8, w8.t()),
        ("Dgrad", x.grad, dy8, w8),
        ("Wgrad", linear.weight.grad, dy8_t.t(), x8_t),
    ):
        exact = left @ right
        plain = error(left.float() @ right.float(), exact)
        assert error(got, exact) <= 2 * plain, name


# Freshly initialised as by default, where the residual carries the block; and weights that keep their input's size, of
# which each product's rounding (2.6 % an operand) shows in full.
@pytest.mark.parametrize(("std", "bound"), [(0.02, 0.999), (None, 0.997)])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("outliers", [False, True])
def test_gradient_of_a_block_against_full_precision(index, outliers, std, bound):
    torch.manual_seed(index)
    x, dy = torch.randn(1, 256, 256), torch.randn(1, 256, 256)
    if outliers:
        x[..., 5] *= 1000
    want = gradients(layer(index, std=std), x, dy)
    got = gradients(layer(index, FP8Recipe(), std=std), x, dy)
    assert got.keys() == want.keys()
    for name in want:
        cosine = nn.functional.cosine_similarity(got[name].flatten().double(), want[name].flatten().double(), dim=0)
        # What sums over tokens cancels where one channel outweighs the rest: there the way through the block counts.
        if outliers and name not in ("output", "input"):
            continue
        assert cosine > (bound if name in ("output", "input") else 0.99), f"{name} {cosine:.5f}"


def expert_oracle(experts, x, index, weights):
    """float64, one pair after another, operands rounded as the report says where the forward quantises them."""
    x8 = quantised(x, 1, 128, None)
    total = torch.zeros_like(x8)
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
            if expert >= experts.num_experts:
                continue
            gate_up = quantised(experts.gate_up_proj[expert].detach(), 128, 128, None) @ x8[token]
            gate, up = gate_up.chunk(2)
            inner = quantised((gate * torch.sigmoid(gate) * up)[None].float(), 1, 128, None)[0]
            total[token] += weight * (quantised(experts.down_proj[expert].detach(), 128, 128, None) @ inner)
    return total


def test_experts_match_a_loop_over_pairs_and_foreign_experts_add_nothing():
    experts = layer(1, FP8Recipe()).mlp.experts
    x = torch.randn(24, 256, requires_grad=True)
    index = torch.rand(24, 10).topk(3).indices  # 8 and 9 live elsewhere
    weights = torch.rand(24, 3).requires_grad_()
    out = experts(x, index, weights)
    # A code on the border of two may round the other way after a float32 product.
    assert error(out, expert_oracle(experts, x.detach(), index, weights.detach())) < 2e-3
    out.backward(torch.randn(24, 256))
    assert not weights.grad[index >= 8].any() and weights.grad[index < 8].all()
    lonely = (index >= 8).all(dim=1)
    assert not out[lonely].any() and not x.grad[lonely].any()


def test_router_weights_get_the_inner_product_with_their_experts_output():
    experts = layer(1, FP8Recipe()).mlp.experts
    x, dy = torch.randn(32, 256), torch.randn(32, 256)
    index = torch.rand(32, 8).topk(2).indices
    weights = torch.rand(32, 2).requires_grad_()
    experts(x, index, weights).backward(dy)
    want = torch.empty(32, 2)
    for slot in range(2):
        alone = torch.zeros(32, 2)
        alone[:, slot] = 1
        want[:, slot] = (experts(x, index, alone) * dy).sum(1).detach()
    # The gradient is rounded on its way in, the experts' output is not.
    assert nn.functional.cosine_similarity(weights.grad.flatten(), want.flatten(), dim=0) > 0.998


def test_gradients_have_their_parameters_dtype():
    block = copy.deepcopy(layer(0, FP8Recipe(), dtype=torch.bfloat16))
    x = torch.randn(1, 128, 256, dtype=torch.bfloat16)
    found = gradients(block, x, torch.randn_like(x))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in found.values())


def test_float32_weight_gradients_are_not_rounded_between_micro_batches():
    def summed(recipe):
        linear = layer(0, recipe).mlp.down_proj
        for seed in range(4):
            torch.manual_seed(seed)
            linear(torch.randn(128, 384)).backward(torch.randn(128, 256))
        return linear.weight.grad

    exact, rounded = summed(FP8Recipe()), summed(FP8Recipe(wgrad_dtype="bfloat16"))
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < error(rounded, exact.double()) < 1e-2
