"""Router, balance loss and experts against the report's formulas, written out here in float64 and plain Python."""

import pytest
import torch
from torch import nn

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset
from deepseek_v3.modeling_deepseek_v3.moe import (
    DeepseekV3MoE,
    DeepseekV3TopkRouter,
    WideProduct,
    sequence_balance_loss,
)
from twins import make_model


def make_router(**overrides):
    router = DeepseekV3TopkRouter(preset("tiny", **overrides))
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_()
    return router


def routed_by_hand(x, router):
    """Equations 12 to 16 for one token: {expert: weight}."""
    scores = torch.sigmoid(router.weight.double() @ x.double()).tolist()
    biased = [s + b for s, b in zip(scores, router.e_score_correction_bias.double().tolist(), strict=True)]
    size = router.num_experts // router.num_group
    groups = [range(start, start + size) for start in range(0, router.num_experts, size)]
    best = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))[: router.topk_group]
    open_experts = [e for g in best for e in g]
    chosen = sorted(open_experts, key=lambda e: -biased[e])[: router.top_k]
    total = sum(scores[e] for e in chosen)
    return {e: scores[e] / total * router.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0])
@pytest.mark.parametrize(("groups", "open_groups", "top_k"), [(1, 1, 2), (4, 2, 3), (2, 1, 4)])
def test_router_follows_the_report(groups, open_groups, top_k, shift):
    router = make_router(n_group=groups, topk_group=open_groups, num_experts_per_tok=top_k)
    router.e_score_correction_bias += shift
    x = torch.randn(40, 64)
    _, weights, indices = router(x)
    for row in range(len(x)):
        expected = routed_by_hand(x[row], router)
        got = dict(zip(indices[row].tolist(), weights[row].tolist(), strict=True))
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, rel=1e-5)


def test_the_bias_never_weighs_and_gets_no_gradient():
    router = make_router(n_group=1, topk_group=1)
    x = torch.randn(10, 64)
    _, before, chosen = router(x)
    router.e_score_correction_bias += 3.0
    _, after, again = router(x)
    assert torch.equal(chosen, again)
    assert torch.equal(before, after)
    assert "e_score_correction_bias" not in dict(router.named_parameters())


def test_router_runs_in_float32_under_autocast_and_in_low_precision():
    router = make_router()
    x = torch.randn(64, 64).bfloat16()
    expected = router(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, indices = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(indices, expected[2])
    assert torch.equal(logits, expected[0])


def test_the_bias_stays_float32_when_the_model_is_loaded_in_bf16(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, router in loaded.model.routers().items():
        assert router.weight.dtype == torch.bfloat16
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, model.model.routers()[layer].e_score_correction_bias)


def balance_by_hand(scores, top_k):
    """Equations 18 to 20 for one sequence, scores [T, E] in float64."""
    tokens, experts = scores.shape
    total = 0.0
    for expert in range(experts):
        hits = sum(expert in row.topk(top_k).indices.tolist() for row in scores)
        share = sum((row[expert] / row.sum()).item() for row in scores) / tokens
        total += experts / (top_k * tokens) * hits * share
    return total


@pytest.mark.parametrize("padding", [False, True])
def test_balance_loss_follows_the_report(padding):
    logits = torch.randn(3 * 11, 8)
    mask = torch.ones(3, 11, dtype=torch.bool)
    if padding:
        mask[0, :4], mask[2, 7:] = False, False
    loss = sequence_balance_loss(logits, 2, mask if padding else None, (3, 11))
    scores = logits.double().sigmoid().view(3, 11, 8)
    expected = sum(balance_by_hand(scores[row][mask[row]], 2) for row in range(3)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_perfect_balance_costs_one():
    eye = torch.eye(4).repeat(3, 1) * 30 - 15  # each token picks its own expert, each expert as often
    assert sequence_balance_loss(eye, 1, None, (1, 12)).item() == pytest.approx(1.0, abs=1e-3)


def test_balance_loss_of_the_model_is_alpha_times_the_sum_over_layers(tokens):
    model = make_model(seq_balance_loss_alpha=0.01, num_nextn_predict_layers=0)
    output = model(tokens, labels=tokens, output_router_logits=True)
    assert len(output.router_logits) == 2
    scores = [logits.double().sigmoid().view(*tokens.shape, -1) for logits in output.router_logits]
    expected = sum(0.01 * sum(balance_by_hand(row, 2) for row in layer) / len(tokens) for layer in scores)
    assert output.balance_loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.loss.item() == pytest.approx((output.main_loss + output.balance_loss).item(), rel=1e-6)
    output.balance_loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


def test_no_token_is_dropped_and_no_expert_forgotten(tokens):
    config = preset("tiny", n_shared_experts=0)
    moe = DeepseekV3MoE(config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.2)
        moe.gate.e_score_correction_bias[3] = 10.0  # every token goes to expert 3
    x = torch.randn(1, 50, 64)
    _, weights, indices = moe.gate(x)
    assert (indices == 3).any(dim=1).all()
    expected = torch.zeros(50, 64)
    for token in range(50):
        for weight, expert in zip(weights[token], indices[token], strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ x[0, token]).chunk(2)
            expected[token] += weight * (moe.experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        config._experts_implementation = implementation
        for grad in (False, True):
            torch.testing.assert_close(moe(x.requires_grad_(grad))[0], expected, rtol=1e-4, atol=1e-5)


def test_layers_between_moe_layers_are_dense_where_the_config_says_so():
    model = make_model(num_hidden_layers=5, first_k_dense_replace=1, moe_layer_freq=2)
    kinds = [isinstance(layer.mlp, DeepseekV3MoE) for layer in model.model.layers]
    assert kinds == [False, False, True, False, True, True]  # the last is the MTP module


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_activation_checkpointing(reentrant, tokens):
    grads = []
    for checkpointing in (False, True):
        model = make_model(seq_balance_loss_alpha=0.1).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, plain in grads[0].items():
        torch.testing.assert_close(grads[1][name], plain, rtol=1e-5, atol=1e-8, msg=name)


def test_load_counts_real_tokens_once_with_and_without_checkpointing(tokens):
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    loads = []
    for reentrant in (None, False, True):
        model = make_model().train()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        for _ in range(2):  # two micro-batches
            model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        loads.append([router.expert_load for router in model.model.routers().values()])
    for plain, *others in zip(*loads, strict=True):
        for other in others:
            assert torch.equal(plain, other)
    main, mtp = loads[0][0], loads[0][-1]
    assert main.sum() == 2 * mask.sum() * 2  # top-2, two micro-batches
    assert mtp.sum() == 2 * mask[:, :-1].sum() * 2
    model.eval()
    model(tokens)
    assert torch.equal(loads[-1][0], next(iter(model.model.routers().values())).expert_load)


def test_the_routers_product_of_16_bits_rounds_results_alone():
    x, w, grad = torch.randn(37, 96).bfloat16(), torch.randn(24, 96).bfloat16(), torch.randn(37, 24)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    out = WideProduct.apply(*leaves)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), x.double() @ w.double().t(), rtol=0, atol=1e-5)
    out.backward(grad)
    for leaf, truth in zip(leaves, (grad.double() @ w.double(), grad.double().t() @ x.double()), strict=True):
        # A gradient of one bfloat16 number moves most results to a neighbour; of two, those near the middle.
        assert (leaf.grad == truth.bfloat16()).float().mean() > 0.97
