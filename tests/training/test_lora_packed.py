"""LoRA by plain PEFT over 4-bit and 8-bit bases: forward and every gradient against float64, an adapter's life."""

import pytest
import torch
from adapters import adapters, beside, change, randomise, reference, relative
from bitsandbytes import functional, nn
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from test_lora_targets import expected_names
from test_lora_trainer import dataset, logged, run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deepseek_v3 import DeepseekV3ForCausalLM, lora_target_modules
from deepseek_v3.quantization import BnbExperts
from twins import make_model

__all__ = ["dataset"]  # a fixture
TOKENS = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(3))
# Widths that bitsandbytes packs: multiples of 64.
SIZES = {"q_lora_rank": 64, "kv_lora_rank": 64, "moe_intermediate_size": 64, "v_head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(**SIZES).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder, bits=4, compute=torch.float32):
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    config = BitsAndBytesConfig(load_in_4bit=True, **options) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=compute, quantization_config=config).eval()


def adapted(base, which="all", **kwargs):
    config = LoraConfig(r=4, lora_alpha=8, **lora_target_modules(base.config, which), **kwargs)
    return randomise(get_peft_model(base, config))


def float64_twin(model):
    """A plain model in float64 with the weights that the packed ones stand for."""
    twin = DeepseekV3ForCausalLM(model.config).double().eval()
    twin.set_experts_implementation("eager")
    weights = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear4bit) and module.weight.quant_state is not None:
            wide = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            weights[f"{name}.weight"] = wide.double()
        elif isinstance(module, BnbExperts):
            stacks = ("gate_up_proj", "down_proj")
            weights |= {f"{name}.{stack}": module.widened(stack, torch.float32).double() for stack in stacks}
    known = twin.state_dict().keys()
    twin.load_state_dict({name: tensor for name, tensor in weights.items() if name in known})
    return twin


@pytest.mark.parametrize("which", ["experts", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_gradients_in_float32(folder, which, checkpointing):
    base = load(folder)
    twin = float64_twin(base)
    model = adapted(base, which)
    assert set(adapters(model)) == expected_names(model.config, which)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    expected, leaves = reference(model, twin, TOKENS, labels=TOKENS)
    output = model(TOKENS, labels=TOKENS)
    assert relative(output.logits, expected.logits) < 1e-5
    expected.loss.backward()
    output.loss.backward()
    for name, (a, b, _) in adapters(model).items():
        for parameter, leaf in zip((a, b), leaves[name], strict=True):
            assert leaf.grad.abs().max() > 0, name
            assert relative(parameter.grad, leaf.grad) < 1e-5, name


def test_no_adapter_can_be_a_no_op(folder):
    """Each adapter of experts alone moves the output by what adding it to the widened stack does."""
    base = load(folder)
    twin, model = float64_twin(base), adapted(base, "experts")
    pairs = adapters(model)
    saved = {name: b.detach().clone() for name, (_, b, _) in pairs.items()}
    for _, b, _ in pairs.values():
        b.data.zero_()
    with torch.no_grad():
        plain = reference(model, twin, TOKENS, output_mtp_logits=True)[0]
        assert len(pairs) == 6
        for name, (_, b, _) in pairs.items():
            b.copy_(saved[name])
            expected = reference(model, twin, TOKENS, output_mtp_logits=True)[0]
            ours = model(TOKENS, output_mtp_logits=True)
            b.zero_()
            key = (lambda out: out.mtp_logits[0]) if name.startswith("model.layers.3") else (lambda out: out.logits)
            moved = key(expected) - key(plain)
            assert moved.abs().max() > 1e-4, name
            assert relative(key(ours) - key(plain), moved) < 1e-2, name


def one_layer(base, compute):
    """The experts of one layer under LoRA, alone, and what multiplies them in float64."""
    experts = base.model.layers[1].mlp.experts
    holder = torch.nn.ModuleDict({"experts": experts})
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = randomise(get_peft_model(holder, LoraConfig(r=4, lora_alpha=8, target_parameters=targets)), size=0.1)
    stacks = {name: experts.widened(name, compute).double() for name in ("gate_up_proj", "down_proj")}
    return model, stacks


@pytest.mark.parametrize(
    ("bits", "compute", "bound"),
    [(4, torch.float32, 1e-5), (4, torch.bfloat16, 2e-2), (8, torch.float32, 1e-5), (8, torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("tokens", [3, 40])
def test_one_layers_experts_in_either_dtype(folder, bits, compute, bound, tokens):
    model, stacks = one_layer(load(folder, bits, compute), compute)
    experts = model.base_model.model["experts"]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 64, generator=generator).to(compute).requires_grad_()
    index = torch.rand(tokens, 8, generator=generator).topk(2).indices
    weights, given = torch.rand(tokens, 2, generator=generator), torch.randn(tokens, 64, generator=generator)
    result = beside(experts, x, index, weights)
    (result.float() * given).sum().backward()

    leaves = {name: [t.detach().double().requires_grad_() for t in pair[:2]] for name, pair in adapters(model).items()}
    wide = {n: s + change(*leaves[f"experts.{n}"], 2.0, s) for n, s in stacks.items()}
    exact = x.detach().double().requires_grad_()
    expected = torch.zeros(tokens, 64, dtype=torch.float64)
    for slot in range(2):
        gate, up = torch.einsum("tk,tnk->tn", exact, wide["gate_up_proj"][index[:, slot]]).chunk(2, dim=-1)
        out = torch.einsum("tk,tnk->tn", torch.nn.functional.silu(gate) * up, wide["down_proj"][index[:, slot]])
        expected = expected + weights[:, slot, None].double() * out
    (expected * given).sum().backward()
    assert relative(result, expected) < bound
    assert relative(x.grad, exact.grad) < bound
    for name, (a, b, _) in adapters(model).items():
        for parameter, leaf in zip((a, b), leaves[name], strict=True):
            assert parameter.dtype == torch.float32 and leaf.grad.abs().max() > 0
            assert relative(parameter.grad, leaf.grad) < bound, name


def outputs(model):
    with torch.no_grad():
        output = model(TOKENS, output_mtp_logits=True)
    return torch.cat([output.logits.flatten(), output.mtp_logits[0].flatten()]).double()


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_and_loaded_it_is_the_same_and_goes_over_a_plain_base(folder, bits, tmp_path):
    model = adapted(load(folder, bits)).eval()
    before = outputs(model)
    assert relative(outputs(load(folder, bits)), before) > 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder, bits), tmp_path).eval()
    assert set(adapters(again)) == set(adapters(model))
    assert torch.equal(outputs(again), before)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    over_plain = PeftModel.from_pretrained(plain, tmp_path).eval()
    for name, pair in adapters(model).items():
        assert all(map(torch.equal, pair[:2], adapters(over_plain)[name][:2])), name


def test_several_adapters(folder):
    base = load(folder)
    parts = [lora_target_modules(base.config, which) for which in ("attention", "experts")]
    targets = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    plain, model = outputs(base), randomise(get_peft_model(base, LoraConfig(r=4, **targets))).eval()
    first = outputs(model)
    model.add_adapter("other", LoraConfig(r=2, **targets))
    randomise(model, seed=1)
    model.set_adapter("other")
    other = outputs(model)
    model.set_adapter("default")
    alone = outputs(model)
    model.base_model.set_adapter(["default", "other"])
    assert min(relative(outputs(model), seen) for seen in (first, alone, other, plain)) > 0.05
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)


def test_a_second_adapter_over_all_is_refused(folder):
    """PEFT adapts a packed linear as a module, where it takes no further parameter."""
    model = adapted(load(folder))
    with pytest.raises(ValueError, match=r"Trying to wrap an `nn.Parameter` of layer 'model.layers.0.mlp"):
        model.add_adapter("other", LoraConfig(r=2, **lora_target_modules(model.config, "all")))


def test_two_active_adapters_are_the_sum_of_their_changes(folder):
    base = load(folder)
    twin, model = float64_twin(base), adapted(base, "experts").eval()
    model.add_adapter("other", LoraConfig(r=2, **lora_target_modules(base.config, "experts")))
    randomise(model, seed=1)
    model.base_model.set_adapter(["default", "other"])
    weights = dict(twin.state_dict())
    for adapter in ("default", "other"):
        for name, (a, b, scaling) in adapters(model, adapter).items():
            weights[name] = weights[name] + change(a.double(), b.double(), scaling, weights[name])
    twin.load_state_dict(weights)
    assert relative(outputs(model), outputs(twin)) < 1e-5


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "safe"])
def test_a_merge_into_packed_experts_is_refused(folder, how):
    model = adapted(load(folder), "experts").eval()
    before = outputs(model)
    with pytest.raises(ValueError, match="routed experts are packed.*Load the base in BF16"):
        model.merge_and_unload(safe_merge=True) if how == "safe" else getattr(model, how)()
    assert torch.equal(outputs(model), before)


def test_the_base_comes_back_from_under_an_adapter(folder):
    base = load(folder)
    before = outputs(base)
    assert torch.equal(outputs(adapted(base, "experts").unload()), before)


def test_peft_s_preparation_for_training_keeps_the_experts_packed(folder):
    base = load(folder, compute=torch.bfloat16)
    size = base.get_memory_footprint()
    prepared = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = sum(2 * t.numel() for n, t in prepared.state_dict().items() if t.dtype == torch.float32 and "abs" not in n)
    assert prepared.get_memory_footprint() <= size + plain  # what was in BF16 is now in float32
    model = adapted(prepared, "experts").train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(a.grad.abs().max() > 0 for a, _, _ in adapters(model).values())
    assert (
        model.get_base_model().model.layers[1].mlp.experts.get_base_layer().gate_up_proj.untyped_storage().size() < 9
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_steps_move_the_adapters_and_nothing_that_is_packed(folder, bits):
    model = adapted(load(folder, bits)).train()
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    kept = {n: b for n, b in model.named_buffers() if "codes" in n or "absmax" in n or "offset" in n}
    assert len(kept) == {4: 24, 8: 12}[bits] and all(torch.equal(b, frozen[n]) for n, b in kept.items())


def test_a_run_resumed_over_a_packed_base_is_the_uninterrupted_one(folder, dataset, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "activation_checkpointing": True}
    whole = run(tmp_path / "whole", dataset, load(folder), **options)
    assert logged(whole)[-1] < logged(whole)[0] - 0.05 and logged(whole, "mtp_loss")[-1] > 0
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run(tmp_path / "again", dataset, load(folder), resume=checkpoint, **options)
    assert len(logged(whole)) == 4 and logged(resumed) == logged(whole)


def test_under_distributed_data_parallel(folder, tmp_path):
    model = adapted(load(folder)).train()
    expected = model(TOKENS, labels=TOKENS).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        loss = parallel(TOKENS, labels=TOKENS).loss
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(a.grad.abs().max() > 0 for a, _, _ in adapters(model).values())
