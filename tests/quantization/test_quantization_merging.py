"""Adapters on FP8 models: dequantised in place, merged in BF16, quantised once, and what that did to the change."""

import logging

import numpy
import pytest
import torch
from official import config_json, dequantized, logged, raw, stored
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config
from deepseek_v3.modeling_deepseek_v3.moe import DeepseekV3Experts
from deepseek_v3.quantization import RoundingReport, keeps_fp8

load = AutoModelForCausalLM.from_pretrained
KEEP, DEQUANTIZE = {"quantization_config": FP8Config(keep=True)}, {"quantization_config": FP8Config(keep=False)}
LINEARS = ["q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = torch.arange(3, 35)[None]


def trained(model, scale=1.0, targets=LINEARS, steps=3):
    """LoRA on linears and experts after a few steps of training, its products scaled."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4 * scale, target_modules=targets, target_parameters=EXPERTS)
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        adapted(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def test_dequantised_in_place_it_is_the_model_that_was_loaded_so(kept, plain, tmp_path):
    kept.set_experts_implementation("eager")
    modules = {name: type(module) for name, module in plain.named_modules()}
    assert kept.dequantize() is kept and not keeps_fp8(kept)
    assert {name: type(module) for name, module in kept.named_modules()} == modules
    ours, expected = kept.state_dict(), plain.state_dict()
    assert ours.keys() == expected.keys() and all(raw(ours[name]) == raw(expected[name]) for name in expected)
    assert {n for n, p in kept.named_parameters() if p.requires_grad} == {n for n, _ in plain.named_parameters()}
    with torch.no_grad():
        outputs = [model(TOKENS, output_mtp_logits=True) for model in (kept, plain)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].mtp_logits[0], outputs[1].mtp_logits[0])
    assert not hasattr(kept.config, "quantization_config") and not hasattr(kept, "hf_quantizer")
    kept(TOKENS, labels=TOKENS).loss.backward()
    assert kept.model.layers[0].self_attn.o_proj.weight.grad.abs().max() > 0
    kept.save_pretrained(tmp_path)
    assert "quantization_config" not in config_json(tmp_path)
    assert not any(name.endswith("_scale_inv") for name in stored(tmp_path))


def test_it_takes_the_dtype_that_the_rest_has(kept, fp8_folder):
    with pytest.raises(ValueError, match=r"dtype=torch.float32: the rest of the model is torch.bfloat16"):
        kept.dequantize(torch.float32)
    assert keeps_fp8(kept)
    kept.to(torch.float32).dequantize()
    source, name = stored(fp8_folder), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    exact = dequantized(source[name], source[f"{name}_scale_inv"]).astype(numpy.float32)
    assert torch.equal(kept.get_parameter(name), torch.from_numpy(exact))
    with pytest.raises(ValueError, match="quantize your model"):
        kept.dequantize()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_modules_are_dequantised_and_stay_offloaded(where, fp8_folder, plain, tmp_path):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i in (0, 1, 3) else "cpu" for i in range(4)}
    model = load(fp8_folder, device_map=places, offload_folder=tmp_path / "offload", **KEEP)
    if where == "cpu":
        from accelerate import cpu_offload

        model = cpu_offload(load(fp8_folder, **KEEP), execution_device="cpu")
    names = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    before = {name for name in names if not name.endswith("_scale_inv")}
    assert any(".experts." in name for name in before)
    model.dequantize()
    model.set_experts_implementation("eager")
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == before
    assert isinstance(model.model.layers[1].mlp.experts, DeepseekV3Experts)
    weights = model.model.layers[1].mlp.experts._hf_hook.weights_map.dataset
    held = {*weights, *getattr(weights, "index", {}), *getattr(weights, "state_dict", {})}
    assert held and not [name for name in held if name.endswith("_scale_inv")]
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    if where == "cpu":
        return  # transformers saves what a device map offloads, and nothing else
    model.save_pretrained(tmp_path / "saved")
    plain.save_pretrained(tmp_path / "expected")
    saved, expected = stored(tmp_path / "saved"), stored(tmp_path / "expected")
    assert {n: raw(t) for n, t in saved.items()} == {n: raw(t) for n, t in expected.items()}


def test_an_adapter_trained_over_fp8_is_merged_in_bf16_and_quantised_once(fp8_folder, kept, tmp_path, caplog):
    adapted = trained(kept)
    with torch.no_grad():
        before = adapted(TOKENS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = load(fp8_folder, experts_implementation="eager", **DEQUANTIZE)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        after = merged(TOKENS).logits
    # The merge itself rounds the sum to BF16; some tokens reach other experts.
    assert torch.cosine_similarity(before.double().flatten(), after.double().flatten(), dim=0) > 0.95
    with caplog.at_level(logging.WARNING):
        merged.save_pretrained(tmp_path / "fp8", quantize="fp8", original=fp8_folder)
    saved, source = stored(tmp_path / "fp8"), stored(fp8_folder)
    changed = {name.removesuffix("_scale_inv") for name in source if raw(saved[name]) != raw(source[name])}
    matrices = {n for n, t in source.items() if t.dtype == torch.float8_e4m3fn}
    touched = {n for n in matrices if ".experts." in n or any(f"{t}.weight" in n for t in LINEARS)}
    assert changed and changed <= touched and any(".experts." in name for name in changed)
    report = merged.rounding_report
    assert report.untouched + len(report.tensors) == len(matrices) and report.untouched >= len(matrices - touched)
    assert changed <= report.tensors.keys() and report.text() in logged(caplog)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.experts.5.down_proj.weight"):
        start = dequantized(source[name], source[f"{name}_scale_inv"])
        start = torch.from_numpy(start.astype(numpy.float32)).bfloat16().double().numpy()
        wanted = merged.state_dict()
        wanted = wanted[name] if name in wanted else wanted["model.layers.2.mlp.experts.down_proj"][5]
        d = (wanted.double().numpy() - start).ravel()
        e = (dequantized(saved[name], saved[f"{name}_scale_inv"]) - start).ravel()
        share, cosine, moved = report.tensors[name]
        assert share == pytest.approx(d @ e / (d @ d), abs=1e-4)
        assert cosine == pytest.approx(d @ e / numpy.sqrt((d @ d) * (e @ e)), abs=1e-4)
        assert moved == pytest.approx(numpy.linalg.norm(e - d) / numpy.linalg.norm(d), abs=1e-4)
    again = load(tmp_path / "fp8", **KEEP)
    with torch.no_grad():
        kept_again = again(TOKENS).logits
    assert torch.cosine_similarity(after.double().flatten(), kept_again.double().flatten(), dim=0) > 0.9


def test_over_a_bf16_original_the_change_is_held_against_what_fp8_makes_of_that(plain, tmp_path, caplog):
    plain.save_pretrained(tmp_path / "bf16")
    merged = trained(plain).merge_and_unload()
    with caplog.at_level(logging.WARNING):
        merged.save_pretrained(tmp_path / "merged", quantize="fp8", original=tmp_path / "bf16")
    load(tmp_path / "bf16", dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded", quantize="fp8")
    saved, rounded, source = (stored(tmp_path / name) for name in ("merged", "rounded", "bf16"))
    report = merged.rounding_report
    assert report.text() in logged(caplog) and "of the change survived" in report.text()
    matrices = {name for name, tensor in saved.items() if tensor.dtype == torch.float8_e4m3fn}
    assert report.untouched + len(report.tensors) == len(matrices) and report.untouched > 10
    for name in matrices - report.tensors.keys():
        assert torch.equal(saved[name].float(), rounded[name].float())  # adding nothing has turned -0 into 0
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.experts.5.down_proj.weight"):
        wanted = merged.state_dict()
        wanted = wanted[name] if name in wanted else wanted["model.layers.2.mlp.experts.down_proj"][5]
        d = (wanted.double() - source[name].double()).numpy().ravel()
        e = [dequantized(folder[name], folder[f"{name}_scale_inv"]) for folder in (saved, rounded)]
        e = (e[0] - e[1]).ravel()
        share, cosine, moved = report.tensors[name]
        assert 0.3 < share < 2 and share == pytest.approx(d @ e / (d @ d), abs=1e-4)
        assert cosine == pytest.approx(d @ e / numpy.sqrt((d @ d) * (e @ e)), abs=1e-4)
        assert moved == pytest.approx(numpy.linalg.norm(e - d) / numpy.linalg.norm(d), abs=1e-4)


def test_a_kept_model_with_adapters_is_dequantised_under_them_and_merged(fp8_folder, kept):
    adapted = trained(kept)
    lora = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
    adapted.dequantize()
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == lora.keys()
    merged = adapted.merge_and_unload()
    other = trained(load(fp8_folder, **DEQUANTIZE), steps=0)
    other.load_state_dict(lora, strict=False)
    expected = other.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert ours.keys() == expected.keys() and all(raw(ours[n]) == raw(expected[n]) for n in expected)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_straight_into_codes_fails_before_anything_changes(safe_merge, kept):
    before = {name: raw(tensor) for name, tensor in kept.state_dict().items() if "_proj" in name and "eh_" not in name}
    adapted = trained(kept, steps=1)
    with pytest.raises(ValueError, match=r"merged into FP8 codes.*model\.dequantize\(\)"):
        adapted.merge_and_unload(safe_merge=safe_merge)
    codes = {n.replace("base_layer.", ""): p for n, p in kept.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert codes and all(raw(parameter) == before[name] for name, parameter in codes.items())


def test_a_change_below_the_rounding_is_said_to_vanish_once(fp8_folder, plain, tmp_path, caplog):
    merged = trained(plain, scale=1e-3, targets=["o_proj"]).merge_and_unload()
    with caplog.at_level(logging.WARNING):
        merged.save_pretrained(tmp_path, quantize="fp8", original=fp8_folder)
    report = merged.rounding_report
    assert report.overall.share < 0.5 and report.vanished
    assert logged(caplog).count("Most of the change vanished") == 1
    assert f"in {len(report.vanished)} of {len(report.tensors)} weights: {report.vanished[0]}" in logged(caplog)
    assert "keep the adapter beside the original weights" in logged(caplog)


def test_the_report_is_its_formula_and_adds_up():
    generator = torch.Generator().manual_seed(0)
    start, change, noise = torch.randn(3, 300, 140, generator=generator, dtype=torch.float64)
    report = RoundingReport()
    report.add("same", start, start + change, start + change)
    report.add("gone", start, start + change, start)
    report.add("turned", start, start + change, start - change)
    report.add("noise", start, start + change, start + change + 3 * noise)
    report.add("none", start, start, start + noise)
    assert list(report.tensors) == ["same", "gone", "turned", "noise"]
    assert report.tensors["same"] == pytest.approx((1, 1, 0), abs=1e-6)
    assert report.tensors["gone"] == pytest.approx((0, 0, 1), abs=1e-6)
    assert report.tensors["turned"] == pytest.approx((-1, -1, 2), abs=1e-6)
    assert report.tensors["noise"].share == pytest.approx(1, abs=0.05)
    assert report.tensors["noise"].cosine == pytest.approx(10**-0.5, abs=0.02)
    assert report.vanished == ["turned", "gone", "noise"] and "gone (0%)" in report.warning()
    shares = [survival.share for survival in report.tensors.values()]
    assert report.overall.share == pytest.approx(sum(shares) / 4)


@pytest.mark.gpu
def test_on_a_gpu_too(fp8_folder, tmp_path):
    kept, plain = (load(fp8_folder, device_map="cuda", **how) for how in (KEEP, DEQUANTIZE))
    adapted = get_peft_model(kept, LoraConfig(r=4, target_modules=LINEARS, target_parameters=EXPERTS))
    with pytest.raises(ValueError, match="dequantize"):
        adapted.merge_and_unload()
    kept = adapted.unload()
    assert keeps_fp8(kept)
    kept.dequantize()
    ours, expected = kept.state_dict(), plain.state_dict()
    assert all(ours[name].is_cuda and torch.equal(ours[name], expected[name]) for name in expected)
    adapted = trained(plain.cpu())
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "cpu", quantize="fp8", original=fp8_folder)
    report = merged.rounding_report
    merged.cuda().save_pretrained(tmp_path / "cuda", quantize="fp8", original=fp8_folder)
    assert {n: raw(t) for n, t in stored(tmp_path / "cuda").items()} == {
        n: raw(t) for n, t in stored(tmp_path / "cpu").items()
    }
    assert merged.rounding_report.tensors == report.tensors
