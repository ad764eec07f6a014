"""Packed experts on a GPU: forward and gradients against float64, saved and loaded, moved, learning, generating."""

import pytest
import torch
from packed import EIGHT_BIT, dense, four_bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_v3 import lora_target_modules
from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint
from deepseek_v3.quantization import BnbExperts
from deepseek_v3.quantization.adapted import from_under_adapters

pytestmark = pytest.mark.gpu
CONFIGS = {
    "nf4": four_bit(torch.bfloat16),
    "fp4": four_bit(torch.bfloat16, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "int8": EIGHT_BIT,
}
STACKS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def folder(request, tmp_path_factory):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 192, "intermediate_size": 384, "kv_lora_rank": 128}
    config = preset("tiny", **sizes, q_lora_rank=128, qk_rope_head_dim=64)
    folder = tmp_path_factory.mktemp("gpu") / request.param
    return write_checkpoint(config, folder, shards=3, quantized=request.param == "fp8")


def load(folder, config=None, device="cuda"):
    options = {"quantization_config": config} if config else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device, **options)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, BnbExperts)]


def relative(value, expected):
    return float((value.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def given(rows, experts, device="cuda"):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, experts.hidden_dim, generator=generator).bfloat16()
    index = torch.rand(rows, experts.num_experts, generator=generator).topk(2).indices
    return x.to(device), index.to(device), torch.rand(rows, 2, generator=generator).to(device)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("rank", [4, 16])
def test_forward_and_gradients_under_lora(folder, kind, rows, rank):
    experts = experts_of(load(folder, CONFIGS[kind]))[0]
    targets = [f"experts.{name}" for name in STACKS]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=targets)
    model = get_peft_model(torch.nn.ModuleDict({"experts": experts}), config)
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    # Drawn on the CPU, which draws the same anywhere; bounds are of these numbers.
    generator = torch.Generator().manual_seed(rows + rank)
    with torch.no_grad():
        for parameter in factors.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    x, index, weights = given(rows, experts)
    x.requires_grad_()
    towards = torch.randn(rows, experts.hidden_dim, generator=generator).cuda()
    under, changes = from_under_adapters(model.base_model.model["experts"])
    result = under(x, index, weights, factors=changes)
    (result.float() * towards).sum().backward()

    leaves = {name: p.detach().double().requires_grad_() for name, p in factors.items()}
    stacks = {name: experts.widened(name, torch.bfloat16).double() for name in STACKS}
    # PEFT nests the wrappers, the first target innermost.
    for name, prefix in (("down_proj", "experts.lora_"), ("gate_up_proj", "experts.base_layer.lora_")):
        a, b = (next(leaf for full, leaf in leaves.items() if f"{prefix}{part}." in full) for part in "AB")
        assert b.shape[0] == stacks[name].shape[1]
        a, b = a.view(experts.num_experts, rank, -1), b.view(len(b), rank, -1)
        stacks[name] = stacks[name] + 2 * torch.einsum("nre,erk->enk", b, a)
    exact = x.detach().double().requires_grad_()
    expected = dense(stacks, exact, index, weights.double())
    (expected * towards).sum().backward()
    # On a CPU, by the same code: 0.8 percent at most.
    assert relative(result, expected) < 2e-2
    assert relative(x.grad, exact.grad) < 2e-2
    for name, parameter in factors.items():
        assert leaves[name].grad.abs().max() > 0
        assert relative(parameter.grad, leaves[name].grad) < 2e-2, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_after_a_forward_it_is_the_same_here_and_on_the_cpu(folder, kind, tmp_path):
    model = load(folder, CONFIGS[kind])
    tokens = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        before = model(tokens, output_mtp_logits=True)
    model.save_pretrained(tmp_path)
    again, here = load(tmp_path), load(tmp_path, device="cpu")
    assert len(experts_of(again)) == 3
    state = model.state_dict()
    for other in (again.state_dict(), here.state_dict()):
        assert other.keys() == state.keys()
        assert all(torch.equal(tensor.cpu(), state[name].cpu()) for name, tensor in other.items())
    with torch.no_grad():
        after = again(tokens, output_mtp_logits=True)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.mtp_logits[0], before.mtp_logits[0])
    for ours, theirs in zip(experts_of(again), experts_of(here), strict=True):
        for name in STACKS:
            assert relative(ours.widened(name, torch.float32).cpu(), theirs.widened(name, torch.float32)) < 1e-6
        expected = theirs(*given(24, theirs, "cpu"))
        assert relative(ours(*given(24, ours)).cpu(), expected) < 1e-2
        assert torch.equal(ours.cpu()(*given(24, ours, "cpu")), expected)
        assert ours.gate_up_proj.device.type == "cpu" and ours.cuda().gate_up_proj.device.type == "cuda"


def test_it_generates_with_and_without_drafts(folder):
    model = load(folder, CONFIGS["nf4"])
    tokens = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0)).cuda()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    for options in ({}, {"use_mtp": True}):
        assert model.generate(tokens, **settings, **options).shape == (2, 28)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_learn_with_activation_checkpointing(folder, kind):
    base = load(folder, CONFIGS[kind])
    packed = [buffer.clone() for experts in experts_of(base) for buffer in experts.buffers()]
    config = LoraConfig(r=8, lora_alpha=16, **lora_target_modules(base.config, "all"))
    model = get_peft_model(base, config).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(0)).cuda()
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    now = [buffer for experts in experts_of(model) for buffer in experts.buffers()]
    assert all(map(torch.equal, packed, now))
