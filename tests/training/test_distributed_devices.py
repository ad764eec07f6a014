"""accelerate's device maps on a CPU: the same answers, the same training, and a refusal to train what is offloaded."""

import distributed_worker as worker
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config, lora_target_modules

TOKENS = torch.tensor([[3, 4, 5, 6, 7]])
DISK = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
DISK |= {f"model.layers.{layer}": "disk" if layer in (1, 3) else "cpu" for layer in range(4)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return worker.write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module", params=["lora", "fp8"])
def plainly(request, bases, tmp_path_factory):
    """Where no device map was given: the kind of base, and what one run knows."""
    folder = tmp_path_factory.mktemp("plainly")
    return request.param, worker.run(folder, lambda: worker.make(request.param, bases), save_strategy="no")[1]


@pytest.mark.parametrize("places", ["auto", "balanced", {"": "cpu"}], ids=str)
def test_adapters_train_alike_under_a_device_map(places, plainly, bases, tmp_path):
    kind, expected = plainly
    known = worker.run(tmp_path, lambda: worker.make(kind, bases, device_map=places), save_strategy="no")[1]
    assert known["loss"] == expected["loss"] and known["biases"] == expected["biases"]


@pytest.mark.parametrize("kind", ["full", "lora", "fp8"])
def test_layers_on_the_disk_are_not_trained(kind, bases, tmp_path):
    trainer = worker.trainer_of(
        tmp_path, lambda: worker.make(kind, bases, device_map=DISK, offload_folder=tmp_path / "offload")
    )
    with pytest.raises(ValueError, match=r"layers\.1\..* is offloaded, and gradients need the weights in place"):
        trainer.train()


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_a_merged_adapter_answers_from_the_disk(kind, bases, tmp_path):
    """PEFT does not find fused experts in an offload folder; merged into files, an adapter needs no PEFT."""
    options = {"quantization_config": FP8Config(keep=False)} if kind == "fp8" else {}
    base = AutoModelForCausalLM.from_pretrained(bases / kind, dtype=torch.float32, **options)
    model = get_peft_model(base, LoraConfig(r=4, **lora_target_modules(base.config, "all")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, device_map=DISK, offload_folder=tmp_path / "offload"
    ).eval()
    assert set(again.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        expected, given = merged(TOKENS, output_mtp_logits=True), again(TOKENS, output_mtp_logits=True)
    assert torch.equal(given.logits, expected.logits)
    assert torch.equal(given.mtp_logits[0], expected.mtp_logits[0])
    answers = [m.generate(TOKENS, max_new_tokens=6, do_sample=False, use_mtp=True) for m in (merged, again)]
    assert torch.equal(*answers)
    offloaded = AutoModelForCausalLM.from_pretrained(
        bases / "plain", dtype=torch.float32, device_map=DISK, offload_folder=tmp_path / "other"
    )
    with pytest.raises(KeyError, match="mlp.experts.0.down_proj"):  # PEFT's own
        PeftModel.from_pretrained(offloaded, tmp_path / "adapter")
