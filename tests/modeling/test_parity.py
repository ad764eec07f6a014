"""Logits against transformers' own class on the same weights, in float32, within 1e-5 relative."""

import pytest
import torch
from transformers import DynamicCache

from deepseek_v3 import LatentCache
from deepseek_v3.modeling_deepseek_v3.attention import absorbed_attention, fused_absorbed_attention, spans_of
from deepseek_v3.modeling_deepseek_v3.latents import Latents
from twins import YARN, make_model, native_twin

TOLERANCE = 1e-5

GRID = [
    (q_lora, yarn, groups, bias)
    for q_lora in (48, None)
    for yarn in (None, YARN)
    for groups in (1, 4)
    for bias in ("spread", "strongly negative")
]


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def build(q_lora, yarn, groups, bias, **overrides):
    rope = {} if yarn is None else {"rope_scaling": dict(yarn)}
    model = make_model(q_lora_rank=q_lora, n_group=groups, topk_group=max(1, groups // 2), **rope, **overrides)
    if bias == "strongly negative":
        for router in model.model.routers().values():
            router.e_score_correction_bias -= 5.0
    return model, native_twin(model)


def padded(tokens):
    """The batch with the first row left-padded by 5, and its mask."""
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return torch.where(mask.bool(), tokens, 2), mask


def real(logits, mask, length):
    """Logits of the tokens that are no padding."""
    return logits[mask[:, -length:].bool()]


@pytest.mark.parametrize(("q_lora", "yarn", "groups", "bias"), GRID)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_prefill_decode_and_chunks_equal_the_native_class(q_lora, yarn, groups, bias, padding, tokens):
    model, native = build(q_lora, yarn, groups, bias)
    tokens, mask = padded(tokens) if padding == "left" else (tokens, torch.ones_like(tokens))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = native(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        whole = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert relative(real(whole, mask, 24), real(expected, mask, 24)) < TOLERANCE
        for steps in ([9] + [1] * 15, [6, 7, 3, 8]):
            cache, native_cache, start = LatentCache(model.config), DynamicCache(config=native.config), 0
            for length in steps:
                end = start + length
                inputs = {
                    "input_ids": tokens[:, start:end],
                    "attention_mask": mask[:, :end],
                    "position_ids": positions[:, start:end],
                }
                ours = model(**inputs, past_key_values=cache).logits
                theirs = native(**inputs, past_key_values=native_cache).logits
                assert relative(real(ours, mask[:, :end], length), real(theirs, mask[:, :end], length)) < TOLERANCE
                assert relative(
                    real(ours, mask[:, :end], length), real(expected[:, start:end], mask[:, :end], length)
                ) < (TOLERANCE)
                start = end


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_both_forms_under_every_back_end(implementation, form, tokens):
    model, native = build(48, YARN, 4, "spread")
    tokens, mask = padded(tokens)
    with torch.inference_mode():
        expected = native(tokens, attention_mask=mask).logits
        model.config.mla_form = form
        model.set_attn_implementation(implementation)
        ours = model(tokens, attention_mask=mask).logits
    assert relative(real(ours, mask, 24), real(expected, mask, 24)) < TOLERANCE


@pytest.mark.parametrize("length", [1, 3])
def test_absorbed_equals_expanded_over_a_cache(length, tokens):
    outputs = {}
    for form in ("expanded", "absorbed"):
        model = make_model(mla_form=form, rope_scaling=dict(YARN))
        cache = LatentCache(model.config)
        with torch.inference_mode():
            model(tokens[:, :20], past_key_values=cache)
            outputs[form] = model(tokens[:, 20 : 20 + length], past_key_values=cache).logits
    assert relative(outputs["absorbed"], outputs["expanded"]) < TOLERANCE
    assert not torch.equal(outputs["absorbed"], outputs["expanded"])  # two computations, not one


def test_plain_rope_equals_the_native_class(tokens):
    model = make_model(rope_interleave=False)
    native = native_twin(model)
    with torch.inference_mode():
        assert relative(model(tokens).logits, native(tokens).logits) < TOLERANCE
        interleaved = make_model(rope_interleave=True)
        assert relative(interleaved(tokens).logits, native(tokens).logits) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementations_agree_with_the_native_loop(implementation, tokens):
    model = make_model()
    native = native_twin(model)
    native.set_experts_implementation("eager")
    model.set_experts_implementation(implementation)
    with torch.inference_mode():
        assert relative(model(tokens).logits, native(tokens).logits) < TOLERANCE


def test_gradients_equal_the_native_class(tokens):
    model = make_model(num_nextn_predict_layers=0, seq_balance_loss_alpha=0.0).train()
    native = native_twin(model).train()
    model(tokens, labels=tokens).loss.backward()
    native(tokens, labels=tokens).loss.backward()
    theirs = dict(native.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, theirs[name].grad) < 1e-4, name


@pytest.mark.parametrize("q_lora", [48, None])
def test_right_padding_changes_no_real_token(q_lora, tokens):
    model = make_model(q_lora_rank=q_lora)
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    with torch.inference_mode():
        alone = model(tokens[1:, :15]).logits
        batch = model(tokens, attention_mask=mask).logits[1:, :15]
    assert relative(batch, alone) < TOLERANCE


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("side", ["none", "left", "ragged"])
def test_the_decode_kernels_form_equals_the_plain_absorbed_one(length, side):
    """On the CPU the kernel's torch truth runs: what is held here is how the model calls it."""
    batch, heads, nope, rank, rope, slots = 3, 4, 16, 32, 8, 20
    query = (torch.randn(batch, heads, length, nope), torch.randn(batch, heads, length, rope))
    latents, weight = torch.randn(batch, slots, rank + rope), torch.randn(heads * (nope + 16), rank)
    ends = torch.tensor([20, 20, 20] if side != "ragged" else [20, 9, 14])
    starts = torch.tensor([0, 0, 0] if side == "none" else [0, 3, 5])
    seen = torch.arange(slots) < (ends[:, None] - torch.arange(length - 1, -1, -1))[..., None]
    mask = (seen & (torch.arange(slots) >= starts[:, None, None]))[:, None]
    spans = spans_of(mask, length)
    assert spans.starts.tolist() == starts.tolist()
    assert spans.lengths.tolist() == ends.tolist()
    together, still = (
        torch.cat(query, dim=-1).transpose(1, 2),
        (torch.ones(1, length, rope), torch.zeros(1, length, rope)),
    )
    held = Latents(latents[..., :rank], latents[..., rank:])
    fused = fused_absorbed_attention(together, still, held, weight, spans, 0.3, interleave=False)
    plain, _ = absorbed_attention(query, latents, weight, mask, 0.3)
    # Sums of numbers of size 5 in another order.
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    mask[0, 0, -1, 7] = False  # a gap is no span
    assert spans_of(mask, length) is None


def test_our_experts_serve_any_model_of_the_layout(tokens):
    model = make_model()
    native = native_twin(model)
    with torch.inference_mode():
        expected = native(tokens).logits
        for one in (model, native):
            one.set_experts_implementation("deepseek_v3")
            assert relative(one(tokens).logits, expected) < TOLERANCE
