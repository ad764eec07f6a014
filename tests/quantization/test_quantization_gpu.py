"""Kept FP8 on a GPU that computes it: chosen by default, close to the dequantised model, generating, learning."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from official import logged, raw, stored
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config
from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint
from deepseek_v3.quantization import FP8Experts, FP8Linear
from deepseek_v3.quantization.linear import multiplies_fp8

pytestmark = pytest.mark.gpu
load = AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module", params=["aligned", "ragged"])
def folder(request, tmp_path_factory):
    width = 256 if request.param == "aligned" else 160
    config = preset("tiny", hidden_size=512, moe_intermediate_size=width, intermediate_size=384, kv_lora_rank=128)
    return write_checkpoint(config, tmp_path_factory.mktemp("gpu") / "model", shards=3)


def cosine(one, two):
    return torch.cosine_similarity(one.double().flatten(), two.double().flatten(), dim=0).item()


@pytest.mark.parametrize("rows", [1, 24, 64])
def test_every_module_gives_on_the_gpu_what_it_gives_on_the_cpu(rows, folder):
    wanted = {"quantization_config": FP8Config(keep=True, compute="dynamic")}
    here, there = load(folder, **wanted), load(folder, device_map="cuda", **wanted)
    generator = torch.Generator().manual_seed(rows)
    for name, module in here.named_modules():
        if not isinstance(module, FP8Linear | FP8Experts):
            continue
        width = module.in_features if isinstance(module, FP8Linear) else module.hidden_dim
        given = [torch.randn(rows, width, generator=generator).bfloat16()]
        if isinstance(module, FP8Experts):
            given += [torch.randint(0, module.num_experts, (rows, 2), generator=generator), torch.rand(rows, 2)]
        with torch.no_grad():
            ours = there.get_submodule(name)(*(tensor.cuda() for tensor in given)).cpu()
            expected = module(*given)
        assert ours.isfinite().all() and cosine(ours, expected) > 0.9999, name


def test_fp8_is_kept_by_default_generates_and_is_saved_bit_for_bit(folder, caplog, tmp_path):
    kept = load(folder, device_map="cuda", dtype=torch.bfloat16)
    assert multiplies_fp8(kept.device, kept.model.layers[0].self_attn.o_proj.compute)
    assert "the device computes FP8" in logged(caplog)
    assert isinstance(kept.model.layers[0].self_attn.o_proj, FP8Linear)
    plain = load(folder, device_map="cuda", quantization_config=FP8Config(keep=False))
    tokens = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        ours, expected = (m(tokens, output_mtp_logits=True) for m in (kept, plain))
    # Some tokens reach other experts: with random weights the CPU measures 0.955.
    assert cosine(ours.logits, expected.logits) > 0.9
    assert cosine(ours.mtp_logits[0], expected.mtp_logits[0]) > 0.9
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    replayed = kept.generate(tokens, **settings)
    assert torch.equal(replayed, kept.generate(tokens, disable_compile=True, **settings))
    assert kept.generate(tokens, use_mtp=True, num_assistant_tokens=1, **settings).shape == (2, 44)
    kept.save_pretrained(tmp_path)
    saved, source = stored(tmp_path), stored(folder)
    assert all(raw(saved[name]) == raw(source[name]) for name in source if "_proj" in name)


# What a GPU has no room for lies in the CPU's memory or on the disk, and is computed on the GPU all the same.
BESIDE = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
BESIDE |= {"model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": "disk", "model.layers.3": "cpu"}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("places", [BESIDE, "auto"], ids=["named", "auto"])
def test_layers_beside_the_gpu_compute_and_are_saved_the_same(places, keep, folder, tmp_path):
    """Equal to a model all on the GPU that is hooked as well: a hooked norm is not fused with what is around it."""
    wanted = {"quantization_config": FP8Config(keep=keep)}
    whole = load(folder, device_map="cuda", **wanted)
    for module in list(whole.modules()):
        add_hook_to_module(module, ModelHook())
    room = {"max_memory": {0: int(0.6 * whole.get_memory_footprint()), "cpu": "8GB"}} if places == "auto" else {}
    beside = load(folder, device_map=places, offload_folder=tmp_path / "offload", **room, **wanted)
    assert {0, "cpu"} <= set(beside.hf_device_map.values())
    assert any(p.is_meta for p in beside.parameters()) and any(p.is_cuda for p in beside.parameters())
    tokens = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(3)).cuda()
    with torch.no_grad():
        ours, expected = (m(tokens, output_mtp_logits=True) for m in (beside, whole))
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.mtp_logits[0], expected.mtp_logits[0])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    for options in ({"disable_compile": True}, {"use_mtp": True, "num_assistant_tokens": 1, "disable_compile": True}):
        decoded = [m.generate(tokens, **settings, **options) for m in (beside, whole)]
        assert torch.equal(*decoded), options
    for model, name in ((beside, "beside"), (whole, "whole")):
        model.save_pretrained(tmp_path / name)
    saved, expected = stored(tmp_path / "beside"), stored(tmp_path / "whole")
    assert {name: raw(tensor) for name, tensor in saved.items()} == {n: raw(t) for n, t in expected.items()}


def test_lora_over_kept_fp8_learns_on_the_gpu(folder):
    model = load(folder, device_map="cuda")
    targets = ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(2)).cuda()
    losses = []
    for _ in range(8):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
