"""An adapter's life under plain PEFT: saved, loaded, merged, unmerged, beside others, and in cached decoding."""

import pytest
import torch
from adapters import adapters, randomise, relative
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config, lora_target_modules
from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint
from deepseek_v3.quantization import keeps_fp8
from twins import make_model

TOKENS = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(3))
FP8 = FP8Config(keep=True, compute="weight_only")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in BF16 and in FP8."""
    root = tmp_path_factory.mktemp("bases")
    write_checkpoint(preset("tiny"), root / "fp8")
    AutoModelForCausalLM.from_pretrained(root / "fp8").save_pretrained(root / "bf16")
    return root


@pytest.fixture(params=["float32", "bf16", "fp8"])
def load(request, folders):
    if request.param == "fp8":
        return lambda: AutoModelForCausalLM.from_pretrained(folders / "fp8", quantization_config=FP8).eval()
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[request.param]
    return lambda: AutoModelForCausalLM.from_pretrained(folders / "bf16", dtype=dtype).eval()


def adapted(base, which="all", **kwargs):
    config = LoraConfig(r=4, lora_alpha=8, **lora_target_modules(base.config, which), **kwargs)
    return randomise(get_peft_model(base, config), size=0.05).eval()


def outputs(model):
    with torch.no_grad():
        output = model(TOKENS, output_mtp_logits=True)
    return torch.cat([output.logits.flatten(), output.mtp_logits[0].flatten()]).double()


def test_saved_and_loaded_it_is_the_same_bit_for_bit(load, tmp_path):
    model = adapted(load())
    before = outputs(model)
    assert relative(outputs(load()), before) > 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert set(adapters(again)) == set(adapters(model))
    assert torch.equal(outputs(again), before)


def test_what_is_saved_goes_over_any_base_of_the_same_weights(folders, tmp_path):
    over_fp8 = adapted(
        AutoModelForCausalLM.from_pretrained(folders / "fp8", quantization_config=FP8).to(torch.float32)
    )
    over_fp8.save_pretrained(tmp_path)
    widened = FP8Config(keep=False)
    base = AutoModelForCausalLM.from_pretrained(folders / "fp8", dtype=torch.float32, quantization_config=widened)
    assert relative(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(over_fp8)) < 1e-5


def test_merged_and_unmerged_again(load):
    base = load().to(torch.float32)
    plain, model = outputs(base), adapted(base)
    before = outputs(model)
    if keeps_fp8(base):
        with pytest.raises(ValueError, match=r"merged into FP8 codes.*model\.dequantize\(\)"):
            model.merge_adapter()
        assert relative(outputs(model), before) == 0
        model.dequantize()
    model.merge_adapter()
    assert relative(outputs(base), before) < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert relative(outputs(model), plain) < 1e-5
    assert relative(outputs(model), before) < 1e-5
    merged = model.merge_and_unload()
    assert relative(outputs(merged), before) < 1e-5
    assert set(merged.state_dict()) == set(make_model().state_dict())


def test_several_adapters(load):
    base = load()
    plain, model = outputs(base), adapted(base)
    first = outputs(model)
    model.add_adapter("other", LoraConfig(r=2, **lora_target_modules(base.config, "all")))
    randomise(model, seed=1, size=0.05)
    model.set_adapter("other")
    other = outputs(model)
    assert relative(other, first) > 0.05 and relative(other, plain) > 0.05
    model.set_adapter("default")
    alone = outputs(model)
    model.base_model.set_adapter(["default", "other"])
    assert min(relative(outputs(model), seen) for seen in (alone, other, plain)) > 0.05
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(outputs(model), alone) and not adapters(model, "other")


def test_two_active_adapters_are_the_sum_of_their_changes(folders):
    base = AutoModelForCausalLM.from_pretrained(folders / "fp8", quantization_config=FP8).to(torch.float32)
    model = adapted(base)
    model.add_adapter("other", LoraConfig(r=2, **lora_target_modules(base.config, "all")))
    randomise(model, seed=1, size=0.05)
    model.base_model.set_adapter(["default", "other"])
    both = outputs(model)
    model.dequantize()
    model.merge_adapter(["default", "other"])
    assert relative(outputs(model), both) < 1e-5


def test_modules_to_save_are_trained_saved_and_merged(load, tmp_path):
    model = adapted(load(), "attention", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.mul_(1.5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {"base_model.model.lm_head.modules_to_save.default.weight"}
    model(TOKENS, labels=TOKENS).loss.backward()
    assert head.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(again.base_model.model.lm_head.modules_to_save["default"].weight, head)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("merge", [False, True])
def test_cached_decoding_honours_the_adapter(load, form, merge):
    model = adapted(load().to(torch.float32))
    model.config.mla_form = form
    whole = outputs(model)
    if merge:
        model.dequantize() if keeps_fp8(model) else None
        model.merge_adapter()
    with torch.no_grad():
        expected = model(TOKENS).logits
        step = model(TOKENS[:, :5], use_cache=True)
        pieces = [step.logits]
        for i in range(5, TOKENS.shape[1]):
            step = model(TOKENS[:, i : i + 1], past_key_values=step.past_key_values)
            pieces.append(step.logits)
    assert relative(torch.cat(pieces, 1), expected.double()) < 1e-5
    assert relative(expected.flatten(), whole[: expected.numel()]) < 1e-5
    with model.disable_adapter(), torch.no_grad():
        assert relative(model(TOKENS).logits, expected.double()) > 0.05
