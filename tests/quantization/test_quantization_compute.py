"""What kept FP8 computes: against the dequantised model, a float64 formula, gradients, generation, adapters."""

import numpy
import pytest
import torch
from official import dequantized, raw, stored
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config
from deepseek_v3.modeling_deepseek_v3.attention import effective_weight
from deepseek_v3.quantization import FP8Experts, FP8Linear

load = AutoModelForCausalLM.from_pretrained
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.fixture
def batch():
    tokens = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def cosine(one, two):
    return torch.cosine_similarity(one.double().flatten(), two.double().flatten(), dim=0).item()


def test_weight_only_gives_the_dequantised_model_bit_for_bit(kept, plain, batch):
    with torch.no_grad():
        ours, expected = (m(**batch, output_mtp_logits=True) for m in (kept, plain))
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.mtp_logits[0], expected.mtp_logits[0])


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_both_forms_of_attention_read_the_same_weights(form, kept, plain, batch):
    with torch.no_grad():
        for model in (kept, plain):
            model.config.mla_form = form
        ours, expected = (
            m(batch["input_ids"][:, -1:], past_key_values=m(batch["input_ids"][:, :-1]).past_key_values).logits
            for m in (kept, plain)
        )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_no_experts_implementation_gets_the_raw_codes(implementation, fp8_folder, plain, batch):
    model = load(fp8_folder, quantization_config=FP8Config(keep=True), experts_implementation=implementation)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_dynamic_activations_stay_close(fp8_folder, plain, batch):
    model = load(fp8_folder, quantization_config=FP8Config(keep=True, compute="dynamic"))
    with torch.no_grad():
        ours, expected = (m(**batch, output_mtp_logits=True) for m in (model, plain))
    assert 0.99 < cosine(ours.logits, expected.logits) < 1 - 1e-7
    assert 0.99 < cosine(ours.mtp_logits[0], expected.mtp_logits[0]) < 1 - 1e-7


def float64_linear(x, codes, scale):
    """Activations in 1 x 128 tiles of amax / 448, codes times scales: the report's product, in float64."""
    x = x.float().numpy()
    columns = numpy.arange(x.shape[1]) // 128
    quantised = numpy.empty(x.shape)
    for tile in range(columns[-1] + 1):
        part = x[:, columns == tile]
        step = (numpy.abs(part).max(axis=1, keepdims=True) / numpy.float32(448)).astype(numpy.float32)
        quantised[:, columns == tile] = torch.from_numpy(part / step).to(torch.float8_e4m3fn).double().numpy() * step
    return quantised @ dequantized(codes, scale).T


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.kv_a_proj_with_mqa", "model.layers.3.self_attn.kv_b_proj"])
def test_a_linear_is_its_float64_formula(name, fp8_folder, kept):
    linear, tensors = kept.get_submodule(name), stored(fp8_folder)
    codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
    x = torch.randn(7, linear.in_features, generator=torch.Generator().manual_seed(2))
    exact = x.double().numpy() @ dequantized(codes, scale).T
    numpy.testing.assert_allclose(linear(x).numpy(), exact, rtol=1e-5, atol=1e-5 * numpy.abs(exact).max())
    linear.compute = "dynamic"
    exact = float64_linear(x, codes, scale)
    numpy.testing.assert_allclose(linear(x).numpy(), exact, rtol=1e-5, atol=1e-5 * numpy.abs(exact).max())


@pytest.mark.parametrize("compute", ["weight_only", "dynamic"])
def test_experts_are_their_float64_formula_and_give_gradients(compute, fp8_folder, kept):
    experts, tensors = kept.model.layers[2].mlp.experts, stored(fp8_folder)
    experts.compute = compute
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 192, generator=generator, requires_grad=True)
    index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator, requires_grad=True)
    output = experts(x, index, weights)
    matrices = {
        (e, part): torch.from_numpy(
            dequantized(*(tensors[f"model.layers.2.mlp.experts.{e}.{part}.weight{s}"] for s in ("", "_scale_inv")))
        )
        for e in range(8)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    rows = []
    for token in range(9):
        total = 0
        for place, e in enumerate(index[token].tolist()):
            gate, up = (matrices[e, part] @ x64[token] for part in ("gate_proj", "up_proj"))
            hidden = torch.nn.functional.silu(gate) * up
            total = total + w64[token, place] * (matrices[e, "down_proj"] @ hidden)
        rows.append(total)
    expected = torch.stack(rows)
    grad = torch.randn(9, 192, generator=generator)
    output.backward(grad)
    expected.backward(grad.double())
    least = 0.9995 if compute == "weight_only" else 0.995
    for ours, exact in ((output, expected), (x.grad, x64.grad), (weights.grad, w64.grad)):
        assert cosine(ours, exact) > least
        assert abs(ours.double().norm() / exact.norm() - 1) < 0.03
        if compute == "weight_only":
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    assert experts.gate_up_proj.grad is None and experts.down_proj.grad is None


def test_experts_of_other_ranks_add_nothing(kept):
    experts = kept.model.layers[1].mlp.experts
    x, weights = torch.randn(3, 192), torch.ones(3, 2)
    own = experts(x, torch.tensor([[0, 8], [8, 8], [3, 8]]), weights)
    assert not own[1].any()
    assert torch.equal(own[0], experts(x[:1], torch.tensor([[0]]), weights[:1, :1])[0])


def test_absorbed_decode_sees_a_change_of_the_codes_at_once(kept):
    linear = kept.model.layers[0].self_attn.kv_b_proj
    like = torch.zeros(1, dtype=torch.float32)
    expected = torch.from_numpy(dequantized(linear.weight.detach(), linear.weight_scale_inv.detach())).float()
    assert torch.equal(effective_weight(linear, like), expected)
    with torch.no_grad():
        linear.weight_scale_inv.mul_(2)
    assert torch.equal(effective_weight(linear, like), 2 * expected)


@pytest.mark.parametrize("options", [{}, {"use_mtp": True, "num_assistant_tokens": 1}, {"num_beams": 2}])
def test_generation_is_that_of_the_dequantised_model(options, kept, plain, batch):
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 2, "eos_token_id": None, **options}
    assert torch.equal(kept.generate(**batch, **settings), plain.generate(**batch, **settings))


def test_casting_and_moving_a_model_leaves_codes_and_scales_alone(kept):
    before = {name: raw(tensor) for name, tensor in kept.state_dict().items() if "_proj" in name and "eh_" not in name}
    kept.to(torch.float32)
    after = kept.state_dict()
    assert all(raw(after[name]) == value for name, value in before.items())
    assert kept.model.norm.weight.dtype == torch.float32
    assert kept.model.layers[0].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
    assert kept(torch.arange(3, 9)[None]).logits.dtype == torch.float32
    meta = kept.to("meta")
    assert meta.model.layers[1].mlp.experts.gate_up_proj_scale_inv.dtype == torch.float32


@pytest.mark.parametrize("compute", ["weight_only", "dynamic"])
def test_lora_over_kept_fp8_learns(compute, fp8_folder, batch):
    model = load(fp8_folder, quantization_config=FP8Config(keep=True, compute=compute))
    with torch.no_grad():
        before = model(**batch).logits
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(6):
        loss = adapted(**batch, labels=labels).loss
        loss.backward()
        losses.append(float(loss))
        grads = {n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
        assert all(g is not None and g.isfinite().all() for g in grads.values())
        assert any("layers.0" in n and g.abs().max() > 0 for n, g in grads.items())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        assert not torch.equal(adapted(**batch).logits, before)
        # Absorbed and expanded decode agree on the adapted kv_b_proj.
        results = []
        for form in ("expanded", "absorbed"):
            model.config.mla_form = form
            prompt = adapted(batch["input_ids"][:, :-1], use_cache=True)
            results.append(adapted(batch["input_ids"][:, -1:], past_key_values=prompt.past_key_values).logits)
    assert cosine(*results) > (0.999 if compute == "weight_only" else 0.95)
    codes = [p for n, p in adapted.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert codes and not any(p.requires_grad or p.grad is not None for p in codes)


def route_alike(leader, follower):
    """Send the follower's tokens where the leader's went in its last forward; the weights stay the follower's own."""
    chosen = {}

    def follow(name, router, output):
        scores = output[0].sigmoid().gather(1, chosen[name])
        return output[0], scores / scores.sum(-1, keepdim=True) * router.routed_scaling_factor, chosen[name]

    for name, router in leader.named_modules():
        if name.endswith("mlp.gate"):
            router.register_forward_hook(lambda _, inputs, out, name=name: chosen.__setitem__(name, out[2]))
            own = follower.get_submodule(name)
            own.register_forward_hook(lambda router, inputs, out, name=name: follow(name, router, out))


@pytest.mark.parametrize("compute", ["weight_only", "dynamic"])
def test_lora_on_the_experts_is_added_to_the_matrices_not_to_the_codes(compute, kept, plain, batch):
    config = LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    for module in kept.modules():
        if isinstance(module, FP8Linear | FP8Experts):
            module.compute = compute
    models = [get_peft_model(model, config) for model in (plain, kept)]
    route_alike(*models)
    generator = torch.Generator().manual_seed(4)
    named = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        before = models[0](**batch).logits
        for name, parameter in named[0].items():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                named[1][name].copy_(parameter)
    losses = [model(**batch, labels=batch["input_ids"]) for model in models]
    for loss in losses:
        loss.loss.backward()
    gradients = [[n[name].grad for n in named] for name in named[0] if "lora_B" in name and "experts" in name]
    assert len(gradients) == 6 and cosine(losses[0].logits, before) < 0.9
    logits = [loss.logits for loss in losses]
    if compute == "weight_only":
        assert torch.equal(*logits) and all(torch.equal(*pair) for pair in gradients)
    else:
        # Measured: 0.998, and 0.945 to 0.996. Each layer by itself: tests/training/test_lora_targets.py.
        assert cosine(*logits) > 0.995 and min(cosine(*pair) for pair in gradients) > 0.92


def test_anything_else_on_the_codes_is_refused(kept, batch):
    experts = kept.model.layers[1].mlp.experts
    torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match="FP8Config\\(keep=False\\)"):
        kept(**batch)


def test_gradients_reach_the_input_through_checkpointed_layers(kept, plain, batch):
    grads = []
    for model in (kept, plain):
        model.train()
        model.gradient_checkpointing_enable()
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=batch["input_ids"]).main_loss.backward()
        grads.append(embeds.grad)
    assert cosine(*grads) > 0.999


def test_the_repr_tells_what_a_module_is(kept):
    assert "FP8Linear(192" in repr(kept.model.layers[0].self_attn) or "FP8Linear" in repr(kept)
    assert isinstance(kept.model.layers[3].mlp.experts, FP8Experts)
    assert isinstance(kept.model.layers[3].mlp.shared_experts.up_proj, FP8Linear)
