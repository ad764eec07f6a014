"""What PEFT offers besides plain LoRA: each works here exactly, or is refused in one line that says why."""

import pytest
import torch
from adapters import adapters, float64_twin, randomise, reference, relative
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config, lora_target_modules
from twins import make_model

TOKENS = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in float32 and in FP8."""
    root = tmp_path_factory.mktemp("bases")
    model = make_model()
    model.save_pretrained(root / "plain")
    model.save_pretrained(root / "fp8", quantize="fp8")
    return root


def load(folders, name="plain"):
    options = {"quantization_config": FP8Config(keep=True, compute="weight_only")} if name == "fp8" else {}
    return AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32, **options).eval()


def config_of(base, which="attention", **kwargs):
    return LoraConfig(r=4, lora_alpha=8, **lora_target_modules(base.config, which), **kwargs)


def adapted(base, which="attention", **kwargs):
    return randomise(get_peft_model(base, config_of(base, which, **kwargs))).eval()


def two(base, which="attention"):
    """Adapters "default" and "other"."""
    model = adapted(base, which)
    model.add_adapter("other", config_of(base, which))
    return randomise(model, seed=1).eval()


def outputs(model):
    with torch.no_grad():
        output = model(TOKENS, output_mtp_logits=True)
    return torch.cat([output.logits.flatten(), output.mtp_logits[0].flatten()]).double()


def step_by_step(model, form):
    model.config.mla_form = form
    with torch.no_grad():
        step = model(TOKENS[:, :5], use_cache=True)
        pieces = [step.logits]
        for i in range(5, TOKENS.shape[1]):
            step = model(TOKENS[:, i : i + 1], past_key_values=step.past_key_values)
            pieces.append(step.logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_dora_and_rslora_on_the_latent_attention(kind, folders):
    model = adapted(load(folders), **kind)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    whole = outputs(model)
    expected = whole[: TOKENS.numel() * 512].view(2, 12, 512)
    for form in ("absorbed", "expanded"):
        assert relative(step_by_step(model, form), expected) < 1e-5
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert relative(outputs(model.merge_and_unload(safe_merge=True)), whole) < 1e-5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"use_dora": True}, "does not work with use_dora=True"),
        ({"lora_dropout": 0.1}, "does not work with lora_"),
    ],
    ids=str,
)
def test_dora_and_dropout_on_experts_are_refused(kind, message, folders):
    with pytest.raises(ValueError, match=message):
        adapted(load(folders), "experts", **kind)


@pytest.mark.parametrize("name", ["plain", "fp8"])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_adapters_that_start_from_a_matrix_are_refused_on_experts(start, name, folders):
    with pytest.raises(AttributeError, match=r"holds its experts in the stacks.*True or 'gaussian'.*'attention'"):
        get_peft_model(load(folders, name), config_of(load(folders, name), "experts", init_lora_weights=start))
    assert not hasattr(load(folders, name).model.layers[1].mlp.experts, "weight")


def test_pissa_on_the_attention_alone_starts_as_the_base(folders):
    base = load(folders)
    expected = outputs(base)
    model = get_peft_model(base, config_of(base, init_lora_weights="pissa")).eval()
    assert relative(outputs(model), expected) < 1e-4 and all(b.abs().max() > 0 for _, b, _ in adapters(model).values())
    with pytest.raises(TypeError, match="Please initialize PiSSA under float32"):
        get_peft_model(load(folders, "fp8"), config_of(base, init_lora_weights="pissa"))


def test_dora_over_codes_is_refused(folders):
    with pytest.raises(ValueError, match=r"this one is FP8 codes.*FP8Config\(keep=False\), or leave use_dora out"):
        adapted(load(folders, "fp8"), use_dora=True)


def test_dropout_on_the_attention_alone(folders):
    model = adapted(load(folders), lora_dropout=0.5)
    still = outputs(model)
    assert torch.equal(outputs(model), still)
    model.train()
    assert not torch.equal(outputs(model), still)


def test_all_linear_adapts_the_router_too_and_exactly(folders):
    base = load(folders)
    twin = float64_twin(base)
    model = randomise(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")), size=0.02).eval()
    gates = [name for name in adapters(model) if name.endswith("mlp.gate.weight")]
    assert len(gates) == 3
    assert any(isinstance(module, ParamWrapper) for module in model.modules())
    expected, leaves = reference(model, twin, TOKENS, labels=TOKENS)
    expected.loss.backward()
    output = model(TOKENS, labels=TOKENS)
    output.loss.backward()
    assert relative(output.logits, expected.logits) < 1e-5
    for name in gates:
        for parameter, leaf in zip(adapters(model)[name][:2], leaves[name], strict=True):
            assert leaf.grad.abs().max() > 0 and relative(parameter.grad, leaf.grad) < 1e-4, name


def test_no_targets_at_all_are_refused(folders):
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        get_peft_model(load(folders), LoraConfig(r=2))


@pytest.mark.parametrize("name", ["plain", "fp8"])
def test_an_adapter_a_row(name, folders):
    model = two(load(folders, name))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    alone = []
    for row, adapter in enumerate(("default", "other")):
        model.set_adapter(adapter)
        alone.append(model.generate(input_ids=TOKENS[row : row + 1], **options))
    assert not torch.equal(alone[0][:, 12:], alone[1][:, 12:])
    mixed = {**options, "adapter_names": ["default", "other"]}
    with pytest.raises(ValueError, match=r'kv_b_proj of its own.*mla_form = "expanded"'):
        model.generate(input_ids=TOKENS, **mixed)
    # One row has one matrix.
    only = model.generate(input_ids=TOKENS[:1], **{**options, "adapter_names": ["default"]})
    assert torch.equal(only, alone[0])
    model.config.mla_form = "expanded"
    assert torch.equal(model.generate(input_ids=TOKENS, **mixed), torch.cat(alone))


def test_an_adapter_a_row_on_experts_is_refused(folders):
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        two(load(folders), "experts")(TOKENS, adapter_names=["default", "other"])


def test_adapters_joined_by_weight(folders):
    model = two(load(folders))
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "joined", combination_type="cat")
    weights = dict(make_model().state_dict())
    for adapter, share in (("default", 1.0), ("other", 0.5)):
        for name, (a, b, scaling) in adapters(model, adapter).items():
            weights[name] = weights[name] + share * scaling * (b @ a).detach()
    expected = make_model()
    expected.load_state_dict(weights)
    model.set_adapter("joined")
    assert relative(outputs(model), outputs(expected)) < 1e-5
    with pytest.raises(ValueError, match="does not support targeting nn.Parameter"):
        two(load(folders), "experts").add_weighted_adapter(["default", "other"], [1.0, 1.0], "joined")


def test_an_embedding_and_a_head_of_ones_own_serve_mtp_too(folders, tmp_path):
    model = adapted(load(folders), "all", modules_to_save=["embed_tokens", "lm_head"])
    start = outputs(model)
    own = [
        model.base_model.model.get_submodule(name).modules_to_save["default"].weight
        for name in ("model.embed_tokens", "lm_head")
    ]
    with torch.no_grad():
        for weight in own:
            weight.mul_(1.5)
    main = TOKENS.numel() * 512
    changed = outputs(model)
    assert relative(changed[:main], start[:main]) > 0.1 and relative(changed[main:], start[main:]) > 0.1
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in own)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folders), tmp_path).eval()
    assert torch.equal(outputs(again), changed)
    assert relative(outputs(again.merge_and_unload(safe_merge=True)), changed) < 1e-5


def test_the_auto_class_reads_base_and_adapter(folders, tmp_path):
    model = adapted(load(folders), "all", task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(outputs(again), outputs(model))
