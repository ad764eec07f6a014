"""Folders whose files hold stacks of experts: read expert by expert, left in place on the disk, scales that fit."""

import os
import shutil

import pytest
import torch
from official import dequantized, raw, stored
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from deepseek_v3 import FP8Config
from deepseek_v3.conversion import convert

load = AutoModelForCausalLM.from_pretrained
KEEP = {"quantization_config": FP8Config(keep=True)}
DEQUANTIZE = {"quantization_config": FP8Config(keep=False), "experts_implementation": "eager"}
HOW = {"kept": KEEP, "dequantised": DEQUANTIZE, "bf16": {"experts_implementation": "eager"}}
STACK = "model.layers.1.mlp.experts.gate_up_proj"
TOKENS = torch.arange(3, 19)[None]
PLACES = dict.fromkeys(("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.2"), "cpu")
PLACES |= {"layers.1": "disk", "layers.3": "disk"}
CAUSAL = {"lm_head": "cpu"} | {f"model.{name}": place for name, place in PLACES.items()}


@pytest.fixture(scope="module")
def folders(fp8_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("stacks")
    load(fp8_folder, **KEEP).save_pretrained(root / "fp8", save_original_format=False, max_shard_size="400KB")
    convert(fp8_folder, root / "bf16", "fused", shard_bytes=800_000, workers=0)
    return root


def folder_of(folders, how):
    return folders / ("bf16" if how == "bf16" else "fp8")


def changed(folder, tmp_path, change):
    """A copy in one file, with its tensors changed."""
    tensors = stored(folder)
    change(tensors)
    tmp_path.mkdir(exist_ok=True)
    shutil.copy(folder / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("whole", [True, False])
def test_stacks_on_the_disk_compute_the_same(how, whole, folders, plain, tmp_path):
    folder = folder_of(folders, how)
    places = {"": "disk"} if whole else CAUSAL
    model = load(folder, device_map=places, offload_folder=tmp_path, **HOW[how])
    assert model.get_parameter(STACK).is_meta
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    # What is stored as the model wants it is read from where it lies.
    written = {path.name for path in tmp_path.iterdir() if ".experts." in path.name}
    assert (f"{STACK}.safetensors" in written) == (how == "dequantised")
    assert written == set() or how == "dequantised"


@pytest.mark.parametrize("how", HOW)
def test_a_base_model_takes_the_stacks_of_a_causal_one(how, folders, plain, tmp_path):
    for places in ({"": "cpu"}, PLACES):
        model = AutoModel.from_pretrained(
            folder_of(folders, how), device_map=places, offload_folder=tmp_path, **HOW[how]
        )
        with torch.no_grad():
            assert torch.equal(model(TOKENS).last_hidden_state, plain.model(TOKENS).last_hidden_state)


def test_a_grid_that_gate_and_up_share_is_dequantised_as_one(folders, tmp_path):
    """transformers' own FP8 experts have such scales where 128 does not divide the experts' width."""
    tensors = stored(folders / "fp8")
    codes, scale = tensors[STACK], tensors[f"{STACK}_scale_inv"]
    assert codes.shape[1:] == (320, 192) and scale.shape[1:] == (4, 2)
    folder = changed(
        folders / "fp8", tmp_path / "a", lambda t: t.update({f"{STACK}_scale_inv": scale[:, :3].contiguous()})
    )
    model = load(folder, **DEQUANTIZE)
    for expert, matrix in enumerate(model.get_parameter(STACK).detach()):
        expected = torch.from_numpy(dequantized(codes[expert], scale[expert, :3]))
        assert torch.equal(matrix, expected.float().bfloat16())
    with pytest.raises(ValueError, match=f"{STACK}_scale_inv: shape"):
        load(folder, **KEEP)


@pytest.mark.parametrize("how", ["kept", "dequantised"])
@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("fault", ["missing", "experts", "rows", "columns", "flat", "integers", "nan", "zero"])
def test_a_stack_s_scale_that_does_not_fit_is_one_clear_error(fault, on_disk, how, folders, tmp_path):
    name = f"{STACK}_scale_inv"

    def change(tensors):
        scale = tensors.pop(name)
        cut = {"experts": scale[:-1], "rows": scale[:, :2], "columns": scale[..., :1], "flat": scale[0]}
        if fault in cut:
            tensors[name] = cut[fault].contiguous()
        elif fault == "integers":
            tensors[name] = scale.int()
        elif fault != "missing":
            scale[-1, -1, -1] = float("nan") if fault == "nan" else 0.0
            tensors[name] = scale

    folder = changed(folders / "fp8", tmp_path / "a", change)
    places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "o"} if on_disk else {}
    with pytest.raises(ValueError, match=name) as error:
        load(folder, **places, **HOW[how])
    assert "model.safetensors" in str(error.value) and "Download" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stack_that_the_model_does_not_have_is_passed_over(folders, plain, tmp_path):
    """An empty tensor may claim any number of experts."""
    name = STACK.replace("layers.1", "layers.9")
    folder = changed(
        folders / "bf16", tmp_path / "a", lambda t: t.update({name: torch.empty(1 << 40, 2, 0).bfloat16()})
    )
    model = load(folder, **HOW["bf16"])
    assert all(torch.equal(tensor, plain.state_dict()[n]) for n, tensor in model.state_dict().items())


def test_a_stack_of_another_shape_is_refused_or_as_asked_left_to_transformers(folders, tmp_path):
    def fewer(tensors):
        tensors[STACK] = tensors[STACK][:-1].clone()

    folder = changed(folders / "bf16", tmp_path / "a", fewer)
    with pytest.raises(ValueError, match=f"{STACK}: shape .7, 320, 192., config.json asks for .8, 320, 192."):
        load(folder)
    info = load(folder, ignore_mismatched_sizes=True, output_loading_info=True)[1]
    assert {key for key, *_ in info["mismatched_keys"]} == {STACK}


def test_a_file_that_is_cut_while_it_is_read_is_one_clear_error(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    with pytest.raises(ValueError, match=r"model-.*safetensors: tensor .*: ends in the middle; download"):
        load(folders / "fp8", **DEQUANTIZE)


def test_saved_again_stacks_are_the_official_tensors_bit_for_bit(folders, fp8_folder, tmp_path):
    model = load(folders / "fp8", device_map=CAUSAL, offload_folder=tmp_path / "o", **KEEP)
    model.save_pretrained(tmp_path / "a")
    saved, source = stored(tmp_path / "a"), stored(fp8_folder)
    assert {name: raw(tensor) for name, tensor in saved.items()} == {n: raw(t) for n, t in source.items()}
