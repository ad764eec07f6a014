"""`BitsAndBytesConfig` packs the routed experts: what they hold and compute, saved and loaded, moved, refused."""

import copy
import json
import shutil

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from bitsandbytes import functional
from official import logged, stored
from packed import EIGHT_BIT, ODD, four_bit, is_plain, load, twin_of, widened, write_bf16
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import deepseek_v3
from deepseek_v3 import DeepseekV3ForCausalLM, FP8Config
from deepseek_v3.configuration import account, preset
from deepseek_v3.configuration.accounting import NF4_BYTES
from deepseek_v3.conversion import inspect, write_checkpoint
from deepseek_v3.quantization import BnbExperts
from deepseek_v3.quantization.bnb_packing import packing_of

TOKENS = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(3))
CONFIGS = {
    "nf4": four_bit(),
    "fp4": four_bit(bnb_4bit_quant_type="fp4"),
    "single": four_bit(bnb_4bit_use_double_quant=False),
    "int8": EIGHT_BIT,
}


@pytest.fixture(scope="module", params=["even", "odd"])
def folder(request, tmp_path_factory):
    return write_bf16(tmp_path_factory.mktemp("bf16") / request.param, **(ODD if request.param == "odd" else {}))


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return write_bf16(tmp_path_factory.mktemp("even") / "model")


def outputs(model, tokens=TOKENS):
    with torch.no_grad():
        output = model(tokens, output_mtp_logits=True)
    return torch.cat([output.logits.flatten(), output.mtp_logits[0].flatten()]).double()


def relative(value, expected):
    return float((value.detach() - expected.detach()).norm() / expected.detach().norm())


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BnbExperts)}


def test_every_layers_experts_are_packed_and_what_no_recipe_packs_stays(even):
    model = load(even, four_bit())
    assert list(experts_of(model)) == [f"model.layers.{layer}.mlp.experts" for layer in (1, 2, 3)]  # 3 is MTP's
    wide = {name: t.shape for name, t in model.state_dict().items() if t.is_floating_point() and t.dim() > 1}
    assert wide and all(is_plain(name) or "absmax" in name or shape[1] % 64 for name, shape in wide.items())
    plain = stored(even)
    for name in ("lm_head.weight", "model.layers.3.eh_proj.weight", "model.layers.1.mlp.gate.weight"):
        assert torch.equal(model.state_dict()[name].bfloat16(), plain[name])
    assert model.num_parameters() == sum(t.numel() for n, t in plain.items() if not copied(n) and "bias" not in n)


def copied(name):
    return name.startswith("model.layers.3.") and ("embed_tokens" in name or "shared_head.head" in name)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_maxima_are_bitsandbytes_own_of_each_expert(even, kind):
    model, plain = load(even, CONFIGS[kind]), stored(even)
    experts = model.model.layers[1].mlp.experts
    for expert in range(experts.num_experts):
        names = [f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = (plain[name].float() for name in names)
        for stack, matrix in {"gate_up_proj": torch.cat([gate, up]), "down_proj": down}.items():
            codes, state = functional.quantize_4bit(matrix, quant_type=kind, compress_statistics=True)
            assert torch.equal(getattr(experts, f"{stack}_codes")[expert], codes.flatten())
            assert torch.equal(getattr(experts, f"{stack}_absmax")[expert], state.absmax)
            wide = experts.widened(stack, torch.float32, torch.tensor([expert]))[0]
            assert torch.equal(wide, widened(codes, state).float())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_output_is_that_of_the_weights_that_are_packed(folder, kind):
    model, twin = load(folder, CONFIGS[kind]), twin_of(folder, CONFIGS[kind])
    if kind == "int8":
        # bitsandbytes rounds an 8-bit linear's activations; its experts' do not.
        compare_experts(model, twin)
    else:
        assert relative(outputs(model), outputs(twin)) < 1e-5
        assert relative(outputs(model, TOKENS[:1, :2]), outputs(twin, TOKENS[:1, :2])) < 1e-5


def compare_experts(model, twin):
    generator = torch.Generator().manual_seed(5)
    for name, packed in experts_of(model).items():
        plain = twin.get_submodule(name)
        x = torch.randn(30, packed.hidden_dim, generator=generator)
        index = torch.rand(30, packed.num_experts, generator=generator).topk(3).indices
        weights = torch.rand(30, 3, generator=generator)
        expected = plain(x.double(), index, weights.double())
        assert relative(packed(x, index, weights).double(), expected) < 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_after_a_forward_and_loaded_it_is_the_same_bit_for_bit(folder, kind, tmp_path):
    model = load(folder, CONFIGS[kind])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = outputs(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    assert len(experts_of(again)) == 3
    assert state.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype, name
    assert torch.equal(outputs(again), before)


def test_fp8_files_are_dequantised_and_packed_as_they_are_read(fp8_folder, tmp_path):
    plain = load(fp8_folder, FP8Config(keep=False))
    plain.save_pretrained(tmp_path)
    packed = load(fp8_folder, four_bit())
    state, expected = packed.state_dict(), load(tmp_path, four_bit()).state_dict()
    assert len(experts_of(packed)) > 1 and state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("layout", ["fused", "float32", "bin", "base"])
def test_other_folders_give_the_same_codes(even, layout, tmp_path):
    model = load(even, dtype=torch.bfloat16)
    expected = load(even, four_bit()).state_dict()
    if layout == "fused":
        model.save_pretrained(tmp_path, save_original_format=False)
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in stored(tmp_path))
    elif layout == "float32":
        model.float().save_pretrained(tmp_path)
    elif layout == "base":
        model.model.save_pretrained(tmp_path)
        expected.pop("lm_head.weight")
    else:
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    state = load(tmp_path, four_bit()).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_classes_called_directly_do_the_same(even, tmp_path):
    expected = load(even, four_bit())
    model = DeepseekV3ForCausalLM.from_pretrained(even, quantization_config=four_bit(), dtype=torch.float32)
    assert torch.equal(outputs(model), outputs(expected))
    assert torch.equal(outputs(load(even, four_bit().to_dict())), outputs(expected))
    model.save_pretrained(tmp_path)
    again = DeepseekV3ForCausalLM.from_pretrained(str(tmp_path), num_nextn_predict_layers=0)
    assert len(experts_of(again)) == 2 and again.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_the_log_says_what_the_experts_take_and_what_the_accounting_says(even, caplog):
    model = load(even, four_bit())
    (line,) = [line for line in logged(caplog).splitlines() if "packed as" in line]
    found = sum(experts.nbytes() for experts in experts_of(model).values())
    bill = account(model.config)
    numbers = 3 * model.config.n_routed_experts * bill.expert_parameters
    assert f"3 layers are packed as NF4, double quantised: {found / 1e6:.3f} MB" in line
    assert f"the accounting says {numbers * NF4_BYTES / 1e6:.3f} MB for 3 layers" in line


def test_the_whole_model_takes_what_inspect_says_it_will(tmp_path):
    config = preset("tiny", hidden_size=256, moe_intermediate_size=128, intermediate_size=256, q_lora_rank=64)
    for name, value in {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "v_head_dim": 32}.items():
        setattr(config, name, value)
    folder = write_checkpoint(config, tmp_path / "model", quantized=False)
    state = load(folder, four_bit(), dtype=torch.bfloat16).state_dict()
    # A linear of bitsandbytes also stores its kind, and the map that its codes stand for.
    found = sum(tensor.nbytes for name, tensor in state.items() if "quant_map" not in name and "_state." not in name)
    assert found == pytest.approx(inspect(folder).needs["nf4"]["weights"], rel=2e-3)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.57), ("single", 0.57), ("int8", 1.01)])
def test_bytes_a_parameter_at_true_sizes(kind, most):
    config = preset("deepseek-v3")
    packing = packing_of(CONFIGS[kind])
    numbers, found = 0, 0
    for rows, columns in [(2 * config.moe_intermediate_size, config.hidden_size), (config.hidden_size, 2048)]:
        parts = packing.sizes(rows, columns).values()
        found += sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts)
        numbers += rows * columns
    assert found / numbers <= most
    assert found / numbers == pytest.approx(packing.bytes_a_number(7168), rel=2e-3)
    assert kind != "nf4" or found / numbers < 0.516


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_moved_and_cast_the_codes_stay(even, kind):
    model = load(even, CONFIGS[kind])
    experts = model.model.layers[1].mlp.experts
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    x, index, weights = torch.randn(5, 64), torch.arange(10).view(5, 2) % 8, torch.rand(5, 2)
    expected = experts(x, index, weights)
    moved = copy.deepcopy(experts).half().to(torch.bfloat16).float().to("cpu")
    for name, tensor in moved.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert torch.equal(moved(x, index, weights), expected)
    meta = copy.deepcopy(experts).to("meta")
    assert meta.gate_up_proj.device.type == "meta" == meta.gate_up_proj_codes.device.type
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(before)
    assert torch.equal(empty(x, index, weights), expected)
    assert experts.gate_up_proj.shape == (8, 64, 64) and experts.gate_up_proj.untyped_storage().nbytes() <= 4


def test_of_a_few_tokens_only_the_experts_that_they_reach_are_widened(even, monkeypatch):
    experts = load(even, four_bit()).model.layers[1].mlp.experts
    asked, whole = [], experts.widened
    monkeypatch.setattr(experts, "widened", lambda name, dtype, hit=None: asked.append(hit) or whole(name, dtype, hit))
    index = torch.tensor([[1, 6], [6, 3]])
    few = experts(torch.randn(2, 64), index, torch.rand(2, 2))
    assert [hit.tolist() for hit in asked] == [[1, 3, 6]] * 2 and few.abs().max() > 0
    foreign = experts(torch.randn(2, 64), torch.full((2, 2), 8), torch.rand(2, 2))  # experts of another rank
    assert torch.equal(foreign, torch.zeros(2, 64))


def test_dequantised_it_is_a_plain_model_of_the_same_weights(even, tmp_path):
    model, twin = load(even, four_bit()), twin_of(even, four_bit(), torch.float32)
    expected = outputs(model)
    model.dequantize()
    assert not experts_of(model) and relative(outputs(model), expected) < 1e-5
    assert model.state_dict().keys() == twin.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-6, atol=1e-7)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load(tmp_path)), outputs(model))


def test_generation_over_packed_experts_is_that_of_the_dequantised_model(even):
    model = load(even, four_bit())
    prompt = TOKENS[:, :6]
    expected = twin_of(even, four_bit(), torch.float32).generate(prompt, max_new_tokens=8, do_sample=False)
    for form in ("absorbed", "expanded"):
        model.config.mla_form = form
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, use_mtp=True), expected)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_in_8_bits_cached_decoding_is_the_whole_forward(even, form):
    model = load(even, EIGHT_BIT)
    model.config.mla_form = form
    with torch.no_grad():
        expected = model(TOKENS).logits
        step = model(TOKENS[:, :5], use_cache=True)
        pieces = [step.logits]
        for i in range(5, TOKENS.shape[1]):
            step = model(TOKENS[:, i : i + 1], past_key_values=step.past_key_values)
            pieces.append(step.logits)
    # bitsandbytes rounds activations to 8 bits, row by row.
    assert relative(torch.cat(pieces, 1), expected) < 5e-2


def test_what_cannot_be_packed_is_said_in_one_line(tmp_path, caplog):
    model = load(write_bf16(tmp_path / "odd", **ODD), four_bit())
    lines = [line for line in logged(caplog).splitlines() if "left in 16 bits" in line]
    plain = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert len(lines) == 1 and lines[0].startswith(f"{len(plain) - 2} linears are left in 16 bits")  # head, eh_proj
    caplog.clear()
    load(tmp_path / "odd", EIGHT_BIT)
    assert "left in 16 bits" not in logged(caplog)


def test_experts_that_are_asked_to_stay_do(even):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "layers.2.mlp.experts"])
    model = load(even, config)
    assert list(experts_of(model)) == ["model.layers.1.mlp.experts", "model.layers.3.mlp.experts"]
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head", "layers.2.mlp.experts"]


def test_bad_input(even, tmp_path):
    with pytest.raises(ValueError, match="bnb_4bit_quant_type='nf5': choose 'nf4' or 'fp4'"):
        load(even, four_bit(bnb_4bit_quant_type="nf5"))
    with pytest.raises(ValueError, match="set load_in_4bit=True or load_in_8bit=True"):
        load(even, BitsAndBytesConfig())
    with pytest.raises(ValueError, match="llm_int8_has_fp16_weight=True keeps 16-bit weights"):
        load(even, BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True))
    for name, missing in {"one": ".layers.1.mlp.experts.3.up_proj", "all": ".layers.1.mlp.experts."}.items():
        folder = tmp_path / name
        shutil.copytree(even, folder)
        save_file({n: t for n, t in stored(even).items() if missing not in n}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"layers.1.mlp.experts.gate_up_proj.*[Dd]ownload the missing shard"):
            load(folder, four_bit())
    model = load(even, four_bit())
    with pytest.raises(ValueError, match="quantize='fp8'|model.dequantize"):
        model.save_pretrained(tmp_path / "fp8", quantize="fp8")
    holder = torch.nn.utils.parametrize
    experts = model.model.layers[1].mlp.experts
    holder.register_parametrization(experts, "down_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match="Identity changes experts that are packed by bitsandbytes"):
        experts(torch.randn(2, 64), torch.zeros(2, 2, dtype=torch.long), torch.rand(2, 2))


def test_accelerate_s_hooks_leave_them_packed(even):
    experts = load(even, four_bit()).model.layers[1].mlp.experts
    x, index, weights = torch.randn(5, 64), torch.arange(10).view(5, 2) % 8, torch.rand(5, 2)
    expected = experts(x, index, weights)
    elsewhere = copy.deepcopy(experts)
    set_module_tensor_to_device(elsewhere, "gate_up_proj", "meta")
    assert elsewhere.gate_up_proj.device.type == "meta" and elsewhere.gate_up_proj.shape == (8, 64, 64)
    add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu", place_submodules=True))
    assert torch.equal(experts(x, index, weights), expected)


def test_only_this_package_s_models_meet_its_quantiser():
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__module__.startswith("transformers.")
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"].__module__.startswith("transformers.")
    deepseek_v3.unregister()
    try:
        assert not any("deepseek" in name for name in AUTO_QUANTIZER_MAPPING)
    finally:
        deepseek_v3.register()
