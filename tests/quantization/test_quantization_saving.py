"""Saving: bit for bit what was kept, BF16 what was dequantised, the official FP8 layout of anything else."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from official import awkward_config, config_json, dequantized, logged, raw, stored, write_fp8
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_v3 import DeepseekV3Config, FP8Config
from deepseek_v3.configuration import official_tensors
from deepseek_v3.conversion import write_checkpoint
from deepseek_v3.quantization import FP8Linear
from twins import make_model

load = AutoModelForCausalLM.from_pretrained
KEEP, DEQUANTIZE = {"quantization_config": FP8Config(keep=True)}, {"quantization_config": FP8Config(keep=False)}
SAFETENSORS = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float32: "f32"}


def kinds(tensors):
    """(kind, shape) by name, as the official list gives them."""
    result = {name: (SAFETENSORS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return {n: ("scale" if n.endswith("_scale_inv") else kind, shape) for n, (kind, shape) in result.items()}


def official(config, quantized):
    return {spec.name: (spec.kind, tuple(spec.shape)) for spec in official_tensors(config, quantized=quantized)}


def reference_codes(weight, power_of_two=False):
    """The quantiser in numpy: scale = amax / 448 by 128 x 128 block, ragged edges padded with zeros."""
    x = weight.float().numpy()
    rows, columns = x.shape
    padded = numpy.zeros((-(-rows // 128) * 128, -(-columns // 128) * 128), numpy.float32)
    padded[:rows, :columns] = x
    tiles = numpy.abs(padded).reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = (tiles.max(axis=(1, 3)) / numpy.float32(448)).astype(numpy.float32)
    if power_of_two:
        scale = numpy.exp2(numpy.ceil(numpy.log2(scale.astype(numpy.float64)))).astype(numpy.float32)
    spread = scale.repeat(128, 0).repeat(128, 1)[:rows, :columns]
    return torch.from_numpy(x / spread).to(torch.float8_e4m3fn), torch.from_numpy(scale)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shard_size", ["50GB", "500KB"])
def test_kept_and_untouched_comes_back_bit_for_bit(shard_size, scale_fmt, tmp_path):
    source = write_fp8(tmp_path / "a", scale_fmt=scale_fmt, shards=4)
    load(source, **KEEP).save_pretrained(tmp_path / "b", max_shard_size=shard_size)
    saved, expected = stored(tmp_path / "b"), stored(source)
    assert {n: raw(t) for n, t in saved.items()} == {n: raw(t) for n, t in expected.items()}
    assert kinds(saved) == kinds(expected) == official(awkward_config(), quantized=True)
    assert config_json(tmp_path / "b")["quantization_config"] == config_json(source)["quantization_config"]
    assert config_json(tmp_path / "b")["torch_dtype"] == "bfloat16"
    if shard_size == "500KB":
        index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
    again = load(tmp_path / "b", **KEEP)
    again.save_pretrained(tmp_path / "b")  # in place: the files that it came from are not mapped any more
    assert {n: raw(t) for n, t in stored(tmp_path / "b").items()} == {n: raw(t) for n, t in expected.items()}


def test_a_step_of_training_changes_what_it_trained_and_nothing_else(fp8_folder, kept, tmp_path):
    with torch.no_grad():
        kept.model.norm.weight.mul_(2)
        kept.model.layers[1].mlp.gate.e_score_correction_bias.add_(1)
    kept.save_pretrained(tmp_path)
    saved, expected = stored(tmp_path), stored(fp8_folder)
    changed = {name for name in expected if raw(saved[name]) != raw(expected[name])}
    assert changed == {"model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"}


def test_dequantised_is_saved_as_official_bf16(fp8_folder, plain, tmp_path):
    plain.save_pretrained(tmp_path)
    saved, source = stored(tmp_path), stored(fp8_folder)
    assert kinds(saved) == official(plain.config, quantized=False)
    assert "quantization_config" not in config_json(tmp_path)
    for name, tensor in saved.items():
        if source[name].dtype == torch.float8_e4m3fn:
            exact = dequantized(source[name], source[f"{name}_scale_inv"]).astype(numpy.float32)
            assert torch.equal(tensor, torch.from_numpy(exact).bfloat16()), name
        else:
            assert raw(tensor) == raw(source[name]), name


def test_a_new_model_of_a_published_configuration_is_not_saved_as_fp8(tmp_path):
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    model = make_model(quantization_config=quantization)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_json(tmp_path)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_saving_writes_the_official_layout(dtype, scale_fmt, tmp_path):
    model = make_model(**{k: v for k, v in awkward_config().to_dict().items() if k not in ("model_type", "dtype")})
    model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, quantize="fp8", scale_fmt=scale_fmt, max_shard_size="500KB")
    saved, config = stored(tmp_path), config_json(tmp_path)
    assert kinds(saved) == official(model.config, quantized=True)
    wanted = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert config["quantization_config"] == (wanted | {"scale_fmt": scale_fmt} if scale_fmt else wanted)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    experts = before["model.layers.2.mlp.experts.gate_up_proj"]
    samples = {
        "model.layers.0.self_attn.kv_a_proj_with_mqa": before["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"],
        "model.layers.2.mlp.experts.3.gate_proj": experts[3, :160],
        "model.layers.2.mlp.experts.3.up_proj": experts[3, 160:],
        "model.layers.3.mlp.experts.7.down_proj": before["model.layers.3.mlp.experts.down_proj"][7],
    }
    for name, weight in samples.items():
        codes, scale = reference_codes(weight, power_of_two=scale_fmt is not None)
        assert raw(saved[f"{name}.weight"]) == raw(codes), name
        assert torch.equal(saved[f"{name}.weight_scale_inv"], scale), name
    # Saving left the model as it was, and what it wrote loads in both ways.
    assert not hasattr(model.config, "quantization_config")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tokens = torch.arange(3, 35)[None]
    kept, plain = load(tmp_path, **KEEP), load(tmp_path, **DEQUANTIZE, experts_implementation="eager")
    for name, tensor in plain.state_dict().items():
        # E4M3 has steps of 1/8: a uniform error of up to 1/16, 2.6 percent in the mean square.
        error = (tensor.float() - before[name].float()).norm() / before[name].float().norm()
        assert error < (0.03 if scale_fmt is None else 0.032), name
    with torch.no_grad():
        ours, expected = (m(tokens, output_mtp_logits=True) for m in (kept, plain))
    assert torch.equal(ours.logits, expected.logits) and torch.equal(ours.mtp_logits[0], expected.mtp_logits[0])


def test_fp8_to_bf16_to_fp8_gives_the_same_codes(fp8_folder, plain, tmp_path):
    plain.save_pretrained(tmp_path, quantize="fp8")
    saved, source = stored(tmp_path), stored(fp8_folder)
    for name, tensor in source.items():
        if name.endswith("_scale_inv"):
            # A block's largest number was rounded to BF16 on the way.
            assert ((saved[name] / tensor - 1).abs() <= 2**-8).all(), name
        else:
            assert raw(saved[name]) == raw(tensor), name


def test_a_kept_model_can_be_saved_so_too_and_keeps_its_codes(fp8_folder, kept, tmp_path):
    kept.save_pretrained(tmp_path / "a", quantize="fp8")
    saved, expected = stored(tmp_path / "a"), stored(fp8_folder)
    assert {n: raw(t) for n, t in saved.items()} == {n: raw(t) for n, t in expected.items()}
    assert isinstance(kept.config.quantization_config, FP8Config)
    with pytest.raises(ValueError, match="no powers of two"):
        kept.save_pretrained(tmp_path / "b", quantize="fp8", scale_fmt="ue8m0")


def test_of_a_fine_tuned_model_only_what_training_touched_is_quantised_again(fp8_folder, plain, tmp_path, caplog):
    small, large = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    experts = plain.get_parameter("model.layers.2.mlp.experts.down_proj")
    with torch.no_grad():
        for name, size in ((small, 0.01), (large, 1.0)):
            weight = plain.get_parameter(name)
            change = torch.randn(weight.shape, generator=generator) * weight.float().std() * size
            weight.copy_(weight.float() + change)
        experts[5] *= 1.5
    with caplog.at_level(logging.WARNING):
        plain.save_pretrained(tmp_path, quantize="fp8", original=fp8_folder)
    saved, source = stored(tmp_path), stored(fp8_folder)
    changed = {name.removesuffix("_scale_inv") for name in source if raw(saved[name]) != raw(source[name])}
    assert changed == {small, large, "model.layers.2.mlp.experts.5.down_proj.weight"}
    assert "3 were changed" in logged(caplog)
    assert f"vanished in FP8's rounding in 1 of 3 weights: {small}" in logged(caplog)
    assert plain.rounding_report.vanished == [small] and len(plain.rounding_report.tensors) == 3
    assert kinds(saved) == official(plain.config, quantized=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quantize": "int8"}, "only 'fp8'"),
        ({"quantize": "fp8", "scale_fmt": "e8"}, "ue8m0"),
        ({"scale_fmt": "ue8m0"}, "only 'fp8'"),
        ({"quantize": "fp8", "variant": "x"}, "without variant"),
        ({"quantize": "fp8", "repo_id": "a/b"}, "without repo_id"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_model().save_pretrained(tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.2\.down_proj\.weight holds NaN"):
        model.save_pretrained(tmp_path / "a", quantize="fp8")
    assert not (tmp_path / "a").exists()


def test_tied_and_multi_token_models_are_written_whole(tmp_path):
    model = make_model(tie_word_embeddings=True, num_nextn_predict_layers=2)
    model.tie_weights()
    model.save_pretrained(tmp_path, quantize="fp8")
    assert kinds(stored(tmp_path)) == official(model.config, quantized=True)
    again = load(tmp_path, **KEEP)
    assert isinstance(again.model.layers[4].self_attn.o_proj, FP8Linear)
    assert DeepseekV3Config.from_pretrained(tmp_path).quantization_config["quant_method"] == "deepseek_fp8"


def test_the_fused_layout_is_read_in_both_ways(kept, plain, tmp_path):
    kept.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj_scale_inv" in stored(tmp_path)
    again, dequantised = load(tmp_path, **KEEP), load(tmp_path, **DEQUANTIZE)
    assert {n: raw(t) for n, t in again.state_dict().items()} == {n: raw(t) for n, t in kept.state_dict().items()}
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in dequantised.state_dict().items())


def test_a_folder_is_saved_over_while_it_is_read_and_older_files_go(fp8_folder, tmp_path):
    folder = Path(shutil.copytree(fp8_folder, tmp_path / "a"))
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i in (0, 3) else "cpu" for i in range(4)}
    expected = {name: raw(tensor) for name, tensor in stored(folder).items()}
    for limit in ("300KB", "5GB"):
        model = load(folder, device_map=places, offload_folder=tmp_path / limit, **KEEP)
        assert any(parameter.is_meta for parameter in model.parameters())
        model.save_pretrained(folder, quantize="fp8", original=folder, max_shard_size=limit)
        assert {name: raw(tensor) for name, tensor in stored(folder).items()} == expected
        files = sorted(path.name for path in folder.glob("*.safetensors*"))
        if limit == "5GB":
            assert files == ["model.safetensors"]
        else:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == files
            assert index["metadata"]["total_size"] == sum(map(len, expected.values()))
            assert all((folder / name).stat().st_size < 320_000 for name in files)
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_a_save_that_fails_leaves_the_folder_as_it_was(fp8_folder, plain, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(fp8_folder, tmp_path / "a"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        plain.lm_head.weight[0, 0] = 1  # the last tensor but those of the layers
        plain.model.layers[3].mlp.shared_experts.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="shared_experts.up_proj.weight holds NaN or infinity; nothing was written"):
        plain.save_pretrained(folder, quantize="fp8", max_shard_size="300KB")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pushing_sends_the_new_files_through_transformers(plain, tmp_path, monkeypatch):
    calls = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            calls["repo"] = (repo_id, kwargs)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_commit(self, repo_id, operations, **kwargs):
            calls["commit"] = (repo_id, kwargs["commit_message"], {o.path_in_repo for o in operations})

    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda repo, *a, **k: card)
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "notes.txt").write_text("was here before")
    plain.save_pretrained(folder, quantize="fp8", push_to_hub=True, commit_message="FP8", private=True)
    assert calls["repo"] == ("name", {"exist_ok": True, "token": None, "private": True})
    sent = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    assert calls["commit"] == ("me/name", "FP8", sent)


def test_what_cannot_be_written_is_named(plain, tmp_path):
    weights = dict(plain.state_dict())
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    with pytest.raises(ValueError, match="model.norm.weight is torch.int8"):
        plain.save_pretrained(tmp_path / "a", quantize="fp8", state_dict=weights)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("missing", ValueError, "source: holds no safetensors; give the checkpoint that the model was fine"),
        (
            "renamed",
            ValueError,
            "source holds none of this model's weights; give the checkpoint",
        ),
        ("bf16 other", ValueError, r"q_a_proj.weight is \[136, 192\] here and \[64, 192\] in `original`"),
        ("other", ValueError, r"q_a_proj.weight is \[136, 192\] here and \[64, 192\] in `original`"),
        ("cut", ValueError, "model-00002-of-000003.safetensors: the data is cut short"),
        ("scale", ValueError, "holds a scale that is not finite and positive"),
    ],
)
def test_an_original_that_is_none_is_refused_before_anything_is_written(fault, error, words, plain, tmp_path):
    source = tmp_path / "source"
    if fault != "missing":
        config = awkward_config(**({"q_lora_rank": 64} if "other" in fault else {}))
        write_checkpoint(config, source, shards=3, quantized=fault not in ("bf16 other", "renamed"))
    second = source / "model-00002-of-000003.safetensors"
    if fault == "renamed":
        # As a model of other classes names them.
        save_file({f"inner.{n}": t for n, t in load_file(second).items()}, source / "model.safetensors")
        for path in source.glob("model*0*"):
            path.unlink()
        (source / "model.safetensors.index.json").unlink()
    if fault == "cut":
        second.write_bytes(second.read_bytes()[:-50])
    if fault == "scale":
        tensors = load_file(second)
        next(tensor for name, tensor in tensors.items() if name.endswith("_scale_inv"))[0, 0] = float("nan")
        save_file(tensors, second, metadata={"format": "pt"})
    with pytest.raises(error, match=words):
        plain.save_pretrained(tmp_path / "a", quantize="fp8", original=source)
    assert not (tmp_path / "a").exists()
