"""Loading official FP8 checkpoints: values against float64, what is kept, what is refused, where it is put."""

import errno
import json
import os
import shutil

import numpy
import pytest
import torch
from official import awkward_config, config_json, dequantized, logged, raw, stored
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging
from transformers.utils.quantization_config import FineGrainedFP8Config

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, FP8Config
from deepseek_v3.configuration import official_tensors, preset
from deepseek_v3.conversion import convert, write_checkpoint
from deepseek_v3.quantization import FP8Experts, FP8Linear

load = AutoModelForCausalLM.from_pretrained


def float64_values(folder):
    """Each official tensor but the scales in float64, FP8 ones dequantised."""
    tensors = stored(folder)
    values = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            values[name] = dequantized(tensor, tensors[f"{name}_scale_inv"])
        elif not name.endswith("_scale_inv"):
            values[name] = tensor.double().numpy()
    return values


def official_state(model):
    """The model's tensors under official names, experts taken apart by hand."""
    state = {}
    for name, tensor in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            width = tensor.shape[1] // 2
            for expert, both in enumerate(tensor):
                state[f"{prefix}.{expert}.gate_proj.weight"] = both[:width]
                state[f"{prefix}.{expert}.up_proj.weight"] = both[width:]
        elif last == "down_proj":
            state |= {f"{prefix}.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantised_weights_are_the_float64_product_rounded_once(dtype, fp8_folder, caplog):
    model, info = load(fp8_folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    state, expected = official_state(model), float64_values(fp8_folder)
    for name, tensor in state.items():
        rounded = torch.from_numpy(expected[name].astype(numpy.float32)).to(tensor.dtype)
        assert torch.equal(tensor, rounded), name
    copies = {name for name in expected if ".3.embed_tokens" in name or ".shared_head.head" in name}
    assert state.keys() == expected.keys() - copies
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "hf_quantizer", None)
    assert all(type(m) is torch.nn.Linear for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert logged(caplog).count("FP8 weights are dequantised") == 1
    assert "no CUDA device" in logged(caplog)


def test_kept_weights_are_the_files_own_bytes_and_the_rest_stays_bf16(fp8_folder, kept, caplog):
    tensors, config = stored(fp8_folder), kept.config
    for spec in official_tensors(config, quantized=True):
        if ".experts." in spec.name and spec.kind in ("fp8", "scale"):
            prefix, expert, part, last = spec.name.rsplit(".", 3)
            suffix, down = last.removeprefix("weight"), part == "down_proj"
            stack = getattr(kept.get_submodule(prefix), ("down_proj" if down else "gate_up_proj") + suffix)
            rows = stack[int(expert)] if down else stack[int(expert)].chunk(2)[part == "up_proj"]
        elif spec.name.endswith(("embed_tokens.weight", "shared_head.head.weight")) and ".layers." in spec.name:
            continue
        else:
            rows = kept.get_parameter_or_buffer(spec.name)
        assert raw(rows.detach()) == raw(tensors[spec.name]), spec.name
        kinds = {"fp8": torch.float8_e4m3fn, "scale": torch.float32, "f32": torch.float32, "bf16": torch.bfloat16}
        assert rows.dtype == kinds[spec.kind], spec.name
    frozen = [p for m in kept.modules() if isinstance(m, FP8Linear | FP8Experts) for p in m.parameters()]
    assert frozen and not any(p.requires_grad for p in frozen)
    assert type(kept.lm_head) is torch.nn.Linear and type(kept.model.layers[3].eh_proj) is torch.nn.Linear
    assert kept.is_quantized and kept.config.quantization_config.to_dict()["quant_method"] == "fp8"


def test_a_log_line_says_that_fp8_was_kept_and_why(fp8_folder, caplog):
    load(fp8_folder, quantization_config=FP8Config(keep=True))
    assert logged(caplog).count("FP8 weights stay FP8 in") == 1
    assert "FP8Config(keep=True)" in logged(caplog)


@pytest.mark.parametrize("capability, kept", [((8, 9), True), ((9, 0), True), ((8, 0), False)])
def test_by_default_the_device_decides(capability, kept, monkeypatch):
    from deepseek_v3.kernels import dispatch
    from deepseek_v3.quantization import quantizer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(dispatch, "capability", lambda index: capability)
    for device_map in (None, "auto", {"": 0}, {"model": "cuda:0", "lm_head": "cpu"}):
        assert (quantizer.no_fp8_reason(device_map) is None) == kept, device_map
    assert "no CUDA device" in quantizer.no_fp8_reason({"": "cpu"})


def test_transformers_own_fp8_configuration_brings_no_second_linear(fp8_folder):
    model = load(fp8_folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    model = load(fp8_folder, quantization_config={"quant_method": "fp8", "keep": True})
    assert type(model.model.layers[0].self_attn.o_proj) is FP8Linear


def test_the_file_s_own_dictionary_survives_reading_and_writing(fp8_folder, tmp_path):
    config = AutoConfig.from_pretrained(fp8_folder)
    assert config.quantization_config["quant_method"] == "deepseek_fp8"
    config.save_pretrained(tmp_path)
    assert config_json(tmp_path)["quantization_config"] == config_json(fp8_folder)["quantization_config"]
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == config.quantization_config


@pytest.mark.parametrize("keep", [True, False])
def test_base_and_classification_models_load_it_too(keep, fp8_folder, plain):
    wanted, tokens = FP8Config(keep=keep), torch.arange(3, 19)[None]
    base = AutoModel.from_pretrained(fp8_folder, quantization_config=wanted, experts_implementation="eager")
    classifier = DeepseekV3ForSequenceClassification.from_pretrained(
        fp8_folder, quantization_config=wanted, experts_implementation="eager", num_labels=2
    )
    assert isinstance(base.layers[0].self_attn.o_proj, FP8Linear) == keep
    with torch.no_grad():
        expected = plain.model(tokens).last_hidden_state
        assert torch.equal(base(tokens).last_hidden_state, expected)
        assert torch.equal(classifier.model(tokens).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["kimi-k2", "moonlight-16b-a3b"])
def test_relatives_load(name, tmp_path):
    small = {k: v for k, v in preset("tiny").to_dict().items() if k not in ("model_type", "dtype")}
    q_lora = None if "moonlight" in name else 136
    sizes = awkward_config(num_nextn_predict_layers=0, n_group=1, topk_group=1).to_dict()
    small |= {key: sizes[key] for key in sizes if key in small} | {"q_lora_rank": q_lora}
    write_checkpoint(preset(name, **small), tmp_path / "a", quantized=name == "kimi-k2", shards=2)
    model, info = load(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    state, expected = official_state(model), float64_values(tmp_path / "a")
    for key, tensor in state.items():
        assert torch.equal(tensor, torch.from_numpy(expected[key].astype(numpy.float32)).to(tensor.dtype)), key
    assert model.config.model_type == ("kimi_k2" if name == "kimi-k2" else "deepseek_v3")


def test_powers_of_two_are_recognised_and_stay_float32(fp8_folder, kept, tmp_path, caplog):
    folder = write_checkpoint(awkward_config(), tmp_path / "a", scale_fmt="ue8m0", shards=2)
    model = load(folder, quantization_config=FP8Config(keep=True))
    assert model.config.quantization_config.scale_fmt == "ue8m0"
    assert model.hf_quantizer.power_of_two_scales and not kept.hf_quantizer.power_of_two_scales
    assert model.model.layers[0].self_attn.o_proj.weight_scale_inv.dtype == torch.float32
    # A file that says so and is not so: nothing is rounded, and the claim is dropped.
    shutil.copytree(fp8_folder, tmp_path / "b")
    config = config_json(fp8_folder)
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    liar = load(tmp_path / "b", quantization_config=FP8Config(keep=True))
    assert "no powers of two" in logged(caplog) and liar.config.quantization_config.scale_fmt is None
    assert liar.model.layers[0].self_attn.o_proj.scale_fmt is None
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    assert torch.equal(liar.get_parameter(name), stored(fp8_folder)[name])


def test_bf16_files_with_a_left_over_quantization_config_load_as_bf16(fp8_folder, plain, tmp_path, caplog):
    convert(fp8_folder, tmp_path / "bf16", "bf16", workers=0)
    path = tmp_path / "bf16" / "config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "quantization_config": config_json(fp8_folder)["quantization_config"]}
        )
    )
    model = load(tmp_path / "bf16")
    assert "it is ignored" in logged(caplog)
    assert not hasattr(model.config, "quantization_config")
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_offloading_computes_and_saves_the_same(keep, device_map, fp8_folder, plain, tmp_path):
    if device_map == "disk":
        device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        device_map |= {f"model.layers.{i}": "disk" if i in (0, 1, 3) else "cpu" for i in range(4)}
    model = load(
        fp8_folder,
        device_map=device_map,
        offload_folder=tmp_path / "offload",
        quantization_config=FP8Config(keep=keep),
        experts_implementation="eager",
    )
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        ours, expected = (m(tokens, output_mtp_logits=True) for m in (model, plain))
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.mtp_logits[0], expected.mtp_logits[0])
    assert torch.equal(
        model.generate(tokens, max_new_tokens=4, do_sample=False),
        plain.generate(tokens, max_new_tokens=4, do_sample=False),
    )
    model.save_pretrained(tmp_path / "saved")
    if keep:
        saved, source = stored(tmp_path / "saved"), stored(fp8_folder)
        assert {n: raw(t) for n, t in saved.items()} == {n: raw(t) for n, t in source.items()}
    else:
        assert stored(tmp_path / "saved").keys() == {s.name for s in official_tensors(plain.config)}


def test_a_disk_that_fills_up_while_weights_are_offloaded_is_one_clear_error(fp8_folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    places = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"experts\.down_proj: offloading failed: the disk is full") as error:
        load(fp8_folder, device_map=places, offload_folder=tmp_path / "offload")
    assert "offload_folder on another disk" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "offload").glob("*.mlp.experts.*"))


def broken(fp8_folder, tmp_path, change):
    """A copy in one file, with its tensors changed."""
    tensors = stored(fp8_folder)
    change(tensors)
    (tmp_path / "config.json").write_text((fp8_folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", [KV_A, EXPERT])
@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "zero", "negative", "integers"])
def test_a_scale_that_does_not_fit_is_one_clear_error(fault, name, keep, fp8_folder, tmp_path):
    def change(tensors):
        scale = tensors[f"{name}_scale_inv"]
        if fault == "missing":
            del tensors[f"{name}_scale_inv"]
        elif fault == "shape":
            tensors[f"{name}_scale_inv"] = scale[:-1].clone()
        elif fault == "integers":
            tensors[f"{name}_scale_inv"] = scale.int()
        else:
            scale[-1, -1] = {"nan": float("nan"), "zero": 0.0, "negative": -1.0}[fault]

    folder = broken(fp8_folder, tmp_path, change)
    with pytest.raises(ValueError, match=f"{name}_scale_inv") as error:
        load(folder, quantization_config=FP8Config(keep=keep))
    assert "Download" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [True, False])
def test_a_missing_expert_is_named(keep, fp8_folder, tmp_path):
    folder = broken(fp8_folder, tmp_path, lambda t: (t.pop(EXPERT), t.pop(f"{EXPERT}_scale_inv")))
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.experts.*7|holds no FP8 codes"):
        load(folder, quantization_config=FP8Config(keep=keep))


def test_fp8_weights_are_never_taken_for_plain_ones(fp8_folder, tmp_path, plain):
    shutil.copytree(fp8_folder, tmp_path / "a")
    config = config_json(fp8_folder)
    del config["quantization_config"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json has no quantization_config"):
        load(tmp_path / "a")
    with pytest.raises(ValueError, match="scale .*o_proj.weight_scale_inv is not in the state dict"):
        name = "model.layers.0.self_attn.o_proj.weight"
        plain.load_state_dict({name: stored(fp8_folder)[name]}, strict=False)


@pytest.mark.parametrize(
    "key, value",
    [("weight_block_size", [64, 64]), ("fmt", "e5m2"), ("activation_scheme", "static"), ("scale_fmt", "e4m3")],
)
def test_another_kind_of_fp8_is_refused(key, value, fp8_folder, tmp_path):
    shutil.copytree(fp8_folder, tmp_path / "a")
    config = config_json(fp8_folder)
    config["quantization_config"][key] = value
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=key):
        load(tmp_path / "a")


def test_keeping_fp8_of_a_bf16_checkpoint_is_refused_with_the_remedy(tmp_path):
    write_checkpoint(awkward_config(), tmp_path / "a", quantized=False, shards=1)
    with pytest.raises(ValueError, match="quantize='fp8'"):
        load(tmp_path / "a", quantization_config=FP8Config(keep=True))
    assert isinstance(load(tmp_path / "a", quantization_config=FP8Config()), DeepseekV3ForCausalLM)


def test_state_dicts_of_official_names_load_whole_and_in_shards(fp8_folder, kept, plain):
    tensors = stored(fp8_folder)
    expected = {name: raw(tensor) for name, tensor in kept.state_dict().items()}
    with torch.no_grad():
        for tensor in kept.state_dict().values():
            tensor.copy_(torch.ones_like(tensor, dtype=torch.float32))
    names = sorted(tensors)
    for shard in range(3):
        result = kept.load_state_dict({name: tensors[name] for name in names[shard::3]}, strict=False)
        assert not result.unexpected_keys
    assert {name: raw(tensor) for name, tensor in kept.state_dict().items()} == expected
    kept.load_state_dict(tensors)
    with pytest.raises(RuntimeError, match="FP8 codes in the model"):
        kept.load_state_dict({"model.layers.0.self_attn.o_proj.weight": torch.ones(192, 192)}, strict=False)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for parameter in plain.parameters():
        parameter.data.zero_()
    plain.load_state_dict(tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("keep", [True, False])
def test_loading_shows_a_progress_bar(keep, fp8_folder, capfd):
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        load(fp8_folder, quantization_config=FP8Config(keep=keep))
    finally:
        if not shown:
            logging.disable_progress_bar()
    assert "Loading weights: 100%" in capfd.readouterr().err
