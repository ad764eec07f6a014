"""`lora_target_modules` under a plain `get_peft_model`: which weights, forward and every gradient against float64."""

import pytest
import torch
from adapters import adapters, change, float64_twin, randomise, reference, relative, widened
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config, lora_target_modules
from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint
from twins import make_model

TOKENS = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(3))
ATTENTION = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    write_checkpoint(preset("tiny", moe_intermediate_size=160), folder)  # gate and up with block grids of their own
    return folder


def kept(folder, compute="weight_only"):
    wanted = FP8Config(keep=True, compute=compute)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted).eval()


def adapted(model, which="all", **kwargs):
    config = LoraConfig(r=4, lora_alpha=8, **lora_target_modules(model.config, which), **kwargs)
    return randomise(get_peft_model(model, config))


def expected_names(config, which):
    """The weights that a preset means, by hand."""
    names, layers = set(), config.num_hidden_layers + config.num_nextn_predict_layers
    query = ATTENTION if config.q_lora_rank else ATTENTION - {"q_a_proj", "q_b_proj"} | {"q_proj"}
    for layer in range(layers):
        here = f"model.layers.{layer}"
        moe = layer >= config.first_k_dense_replace
        if which != "experts":
            names |= {f"{here}.self_attn.{name}.weight" for name in query}
        if which != "attention" and moe:
            names |= {f"{here}.mlp.experts.gate_up_proj", f"{here}.mlp.experts.down_proj"}
        if which == "all":
            owner = f"{here}.mlp.shared_experts" if moe else f"{here}.mlp"
            names |= {f"{owner}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
            if layer >= config.num_hidden_layers:
                names.add(f"{here}.eh_proj.weight")
    return names


@pytest.mark.parametrize("which", ["attention", "experts", "all"])
@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": None}, {"num_nextn_predict_layers": 0}], ids=str)
def test_the_presets_mean_these_weights_and_never_the_router(which, overrides):
    model = adapted(make_model(**overrides), which)
    assert set(adapters(model)) == expected_names(model.config, which)
    assert not any("gate.weight" in name for name in adapters(model))


def test_what_the_model_lacks_is_left_out():
    dense = preset("tiny", first_k_dense_replace=3, num_nextn_predict_layers=0)
    assert not any("experts" in name for name in lora_target_modules(dense, "all")["target_parameters"])
    sparse = preset("tiny", first_k_dense_replace=0, n_shared_experts=0)
    assert (
        lora_target_modules(sparse, "all")["target_parameters"]
        == lora_target_modules(sparse, "experts")["target_parameters"]
    )
    with pytest.raises(ValueError, match="no routed experts, its 3 layers are dense"):
        lora_target_modules(dense, "experts")
    with pytest.raises(ValueError, match="preset='mlp': choose 'attention', 'all' or 'experts'"):
        lora_target_modules(dense, "mlp")


def assert_like_float64(model, twin, logits_bound, bound):
    expected, leaves = reference(model, twin, TOKENS, labels=TOKENS)
    output = model(TOKENS, labels=TOKENS)
    assert relative(output.logits, expected.logits) < logits_bound
    expected.loss.backward()
    output.loss.backward()
    for name, (a, b, _) in adapters(model).items():
        for parameter, leaf in zip((a, b), leaves[name], strict=True):
            assert leaf.grad.abs().max() > 0, name
            assert relative(parameter.grad, leaf.grad) < bound, name


@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": None}], ids=str)
def test_forward_and_gradients_in_float32(overrides):
    base = make_model(**overrides)
    twin = float64_twin(base)
    assert_like_float64(adapted(base), twin, 1e-5, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_gradients_over_fp8_in_float32(fp8_folder, checkpointing):
    base = kept(fp8_folder).to(torch.float32)
    twin = float64_twin(base)
    model = adapted(base)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_like_float64(model, twin, 1e-5, 2e-5)


def recorded(model, owners):
    """owner -> its inputs and the gradient to its output, filled by the next forward and backward."""
    found = {}

    def keep(owner):
        def hook(module, inputs, output):
            found[owner] = [inputs, None]
            output.register_hook(lambda grad: found[owner].__setitem__(1, grad))

        return hook

    for path, module in model.get_base_model().named_modules():
        if path in owners:
            module.register_forward_hook(keep(path))
    return found


@pytest.mark.parametrize("compute", [None, "weight_only", "dynamic"])
def test_every_adapters_gradient_in_bf16_is_that_of_its_layer_in_float64(compute, fp8_folder):
    """From what the layer was given and what came back to it: what other layers rounded is none of its doing."""
    base = make_model() if compute is None else kept(fp8_folder, compute)
    base = base.to(torch.bfloat16)
    twin = float64_twin(base)
    model = adapted(base)
    leaves, owners = {}, {}
    for name, (a, b, scaling) in adapters(model).items():
        owner, _, parameter = name.rpartition(".")
        leaves[name] = [t.detach().double().requires_grad_() for t in (a, b)]
        weight = twin.get_parameter(name)
        owners.setdefault(owner, {})[parameter] = weight.detach() + change(*leaves[name], scaling, weight)
    found = recorded(model, owners)
    model(TOKENS, labels=TOKENS).loss.backward()
    for owner, weights in owners.items():
        inputs, grad = found[owner]
        wide = tuple(t.detach().double() if t.is_floating_point() else t for t in inputs)
        torch.func.functional_call(twin.get_submodule(owner), weights, wide).backward(grad.double())
    assert len(leaves) == len(adapters(model)) > 35
    for name, (a, b, _) in adapters(model).items():
        for parameter, leaf in zip((a, b), leaves[name], strict=True):
            assert leaf.grad.abs().max() > 0, name
            assert relative(parameter.grad, leaf.grad) < 2e-2, name


def test_over_fp8_no_adapter_can_be_a_no_op(fp8_folder):
    """Each adapter alone moves the output by what adding it to the dequantised matrix does."""
    base = kept(fp8_folder).to(torch.float32)
    twin, model = float64_twin(base), adapted(base)
    pairs = adapters(model)
    saved = {name: b.detach().clone() for name, (_, b, _) in pairs.items()}
    for _, b, _ in pairs.values():
        b.data.zero_()
    with torch.no_grad():
        plain = reference(model, twin, TOKENS, output_mtp_logits=True)[0]
        for name, (_, b, _) in pairs.items():
            b.copy_(saved[name])
            expected = reference(model, twin, TOKENS, output_mtp_logits=True)[0]
            ours = model(TOKENS, output_mtp_logits=True)
            b.zero_()
            key = (lambda out: out.mtp_logits[0]) if name.startswith("model.layers.3") else (lambda out: out.logits)
            moved = key(expected) - key(plain)
            assert moved.abs().max() > 1e-4, name
            assert relative(key(ours) - key(plain), moved) < 1e-2, name


def test_steps_over_fp8_move_the_effective_weights_by_what_the_adapter_says(fp8_folder):
    model = get_peft_model(kept(fp8_folder), LoraConfig(r=4, **lora_target_modules(preset("tiny"), "all")))
    codes = {
        n: p.detach().view(torch.uint8).clone() for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said = {
        name: change(a, b, s, model.get_base_model().state_dict()[named(model, name)]).detach()
        for name, (a, b, s) in adapters(model).items()
    }
    base = model.get_base_model().state_dict()
    before = {
        name: widened(base[named(model, name)], base[named(model, name) + "_scale_inv"])
        for name in said
        if named(model, name) + "_scale_inv" in base
    }
    assert all(torch.equal(p.detach().view(torch.uint8), codes[n]) for n, p in model.named_parameters() if n in codes)
    merged = model.to(torch.float32)
    merged.dequantize()
    after = merged.merge_and_unload().state_dict()
    assert len(before) > 30
    for name, start in before.items():
        assert said[name].abs().max() > 0
        assert relative(after[name].double() - start, said[name].double()) < 1e-3, name


def named(model, name):
    """The name of an adapted weight inside of PEFT's wrappers."""
    owner, _, parameter = name.rpartition(".")
    depth = {"gate_up_proj": 2, "down_proj": 2}.get(parameter, 1)
    return f"{owner}{'.base_layer' * depth}.{parameter}"
