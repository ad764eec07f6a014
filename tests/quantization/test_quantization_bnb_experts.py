"""`BitsAndBytesConfig` packs the routed experts: what they hold and compute, saved and loaded, moved, refused."""

import json

import pytest
import torch
from bitsandbytes import functional
from official import stored
from packed import EIGHT_BIT, ODD, four_bit, is_plain, load, twin_of, widened, write_bf16

from deepseek_v3.quantization import BnbExperts

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
