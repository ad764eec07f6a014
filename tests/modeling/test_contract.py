"""The rest of a transformers model's contract, and bad input."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
)
from deepseek_v3.configuration import preset
from deepseek_v3.modeling_deepseek_v3.attention import choose_form, effective_weight
from deepseek_v3.modeling_deepseek_v3.losses import cross_entropy_sum, head_cross_entropy_sum
from twins import make_model, spread_weights


def test_the_cheaper_form_is_chosen_and_can_be_forced():
    config = preset("deepseek-v3")
    assert choose_form(config, 1, 4096, cached=True) == "absorbed"
    assert choose_form(config, 160, 4096, cached=True) == "absorbed"
    assert choose_form(config, 171, 4096, cached=True) == "expanded"
    assert choose_form(config, 64, 64, cached=True) == "expanded"  # nothing to save in a first prefill
    assert choose_form(config, 1, 1, cached=False) == "expanded"
    # What the accounting says of both, at the border.
    for queries, keys in ((150, 4096), (180, 4096), (20, 60), (3, 5)):
        expanded = keys * 33_554_432 + queries * keys * 81_920
        absorbed = queries * 33_554_432 + queries * keys * 278_528
        assert choose_form(config, queries, keys, cached=True) == ("absorbed" if absorbed < expanded else "expanded")
    for form in ("expanded", "absorbed"):
        config.mla_form = form
        assert choose_form(config, 1, 4096, cached=True) == form


def decode_logits(model, tokens):
    with torch.no_grad():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        return model(tokens[:, -1:], past_key_values=cache).logits


def test_absorbed_decode_follows_an_adapter_and_a_weight_update(tokens):
    outputs = {}
    for form in ("expanded", "absorbed"):
        base = make_model(mla_form=form)
        lora = LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(base, lora).eval()
        with_adapter = decode_logits(model, tokens)
        with model.disable_adapter():
            without = decode_logits(model, tokens)
        with torch.no_grad():
            for layer in base.model.layers:
                layer.self_attn.kv_b_proj.base_layer.weight.data.mul_(0.5)
        outputs[form] = (with_adapter, without, decode_logits(model, tokens))
    for expanded, absorbed in zip(outputs["expanded"], outputs["absorbed"], strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=1e-4, atol=1e-5)
    with_adapter, without, updated = outputs["absorbed"]
    assert (with_adapter - without).abs().max() > 1e-2
    assert (with_adapter - updated).abs().max() > 1e-2


def test_effective_weight_of_a_wrapper_equals_its_products():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    linear = Doubled(6, 10, bias=False)
    torch.testing.assert_close(effective_weight(linear, torch.ones(1)), 2 * linear.weight)
    plain = nn.Linear(6, 10, bias=False)
    assert effective_weight(plain, torch.ones(1)) is plain.weight


def test_embeddings_can_be_resized_and_mtp_follows(tokens):
    model = make_model()
    model.resize_token_embeddings(600)
    output = model(tokens + 80, labels=tokens + 80, output_mtp_logits=True)
    assert output.logits.shape[-1] == output.mtp_logits[0].shape[-1] == model.config.vocab_size == 600


def test_tied_embeddings_share_memory():
    model = make_model(tie_word_embeddings=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_logits_to_keep(model, tokens):
    with torch.no_grad():
        whole = model(tokens).logits
        torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, whole[:, -3:])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(tokens, labels=tokens, logits_to_keep=3)


@pytest.mark.parametrize("cls", [DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification])
def test_classification_heads_learn(cls, tokens):
    model = spread_weights(cls(preset("tiny", num_labels=4, pad_token_id=2))).train()
    labels = torch.tensor([1, 3]) if cls is DeepseekV3ForSequenceClassification else tokens % 4
    output = model(tokens, labels=labels)
    assert output.logits.shape == ((2, 4) if labels.dim() == 1 else (2, 24, 4))
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_chunked_losses_equal_torch(monkeypatch):
    monkeypatch.setattr("deepseek_v3.modeling_deepseek_v3.losses._CHUNK_ELEMENTS", 7 * 50)
    hidden, head = torch.randn(23, 16, requires_grad=True), nn.Linear(16, 50, bias=False)
    labels = torch.randint(0, 50, (23,))
    labels[::5] = -100
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    grads = torch.autograd.grad(expected, [hidden, head.weight])
    for loss in (cross_entropy_sum(head(hidden), labels), head_cross_entropy_sum(head, hidden, labels, 50)):
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(torch.autograd.grad(loss * 2, [hidden, head.weight]), grads, strict=True):
            torch.testing.assert_close(ours, 2 * theirs, rtol=1e-4, atol=1e-5)


def test_the_mtp_loss_never_holds_its_logits(monkeypatch):
    """The largest tensor that autograd keeps, or that the loss makes, is one chunk of logits."""
    monkeypatch.setattr("deepseek_v3.modeling_deepseek_v3.losses._CHUNK_ELEMENTS", 4 * 1000)
    head = nn.Linear(8, 1000, bias=False)
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = head_cross_entropy_sum(
            head, torch.randn(64, 8, requires_grad=True), torch.zeros(64, dtype=torch.long), 1000
        )
    loss.backward()
    assert max(sizes) == 4000
    assert max(saved) < 64 * 1000


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "no token"),
        ({}, "exactly one of input_ids"),
        ({"input_ids": torch.tensor([[5, 512]])}, "input_ids hold 512"),
        ({"input_ids": torch.tensor([[5, -1]])}, "input_ids hold -1"),
        ({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 512]])}, "labels hold 512"),
        ({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, -7]])}, "labels hold -7"),
        ({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6, 7]])}, "labels have shape"),
        ({"input_ids": torch.tensor([[5, 6]]), "position_ids": torch.tensor([[0, 1, 2]])}, "position_ids have shape"),
        ({"input_ids": torch.tensor([[5, 6]]), "position_ids": torch.tensor([0, 1])}, "position_ids have shape"),
    ],
)
def test_bad_input_is_named(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_more_tokens_than_trained_for_warn_once_without_yarn(caplog):
    tokens = torch.full((1, 20), 5)
    rope = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    with caplog.at_level(logging.WARNING), torch.no_grad():
        make_model(max_position_embeddings=16, rope_scaling=rope)(tokens)
        assert "max_position_embeddings" not in caplog.text
        make_model(max_position_embeddings=16)(tokens)
    assert "20 tokens exceed max_position_embeddings = 16" in caplog.text


def test_every_matrix_starts_at_the_configured_spread():
    fresh = DeepseekV3ForCausalLM(preset("tiny", initializer_range=0.006))
    for name, parameter in fresh.named_parameters():
        if parameter.dim() >= 2:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.15), name


def test_labels_that_come_moved_replace_the_others(model, tokens):
    moved = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        expected = model(tokens, labels=tokens)
        for labels in (None, torch.zeros_like(tokens)):
            output = model(tokens, labels=labels, shift_labels=moved)
            torch.testing.assert_close(output.main_loss, expected.main_loss)
            torch.testing.assert_close(output.mtp_loss, expected.mtp_loss)


def test_pairs_of_other_ranks_experts_give_nothing(model):
    experts = model.model.layers[1].mlp.experts
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[0, 8], [8, 8], [3, 1], [8, 7], [2, 8]])
    model.set_experts_implementation("eager")
    kept = (index < 8).float()
    expected = experts(x, index.clamp(max=7), weights * kept)
    torch.testing.assert_close(experts(x, index, weights), expected)
    assert (experts(x, torch.full((5, 2), 8), weights) == 0).all()
