"""The same bad checkpoints through `from_pretrained`: refused in one line before anything is built from them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import CONFIG
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_conversion_bad_input import BAD, FEW, INDEX, SCALE, edit, remove, set_config, shard
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config

# transformers names missing and unknown tensors in a report, casts dtypes, and reads config.json.
LOADED = {"wrong dtype", "missing tensor", "missing mtp tensor", "unknown tensor", "layer of no number", "NaN codes"}
OTHER_WORDS = {
    "missing scale": ["kv_a_proj_with_mqa.weight_scale_inv is in no file"],
    "fp8 of another kind": ["F8_E5M2", "F8_E4M3"],
    **dict.fromkeys(
        ("scale NaN", "scale infinite", "scale zero", "scale negative"),
        [SCALE, "finite and positive", "model-0", "Download"],
    ),
    "config without a size": ["config.json asks for", "56"],
    "config with a silly size": ["hidden_size", "256"],
    "config with another size": ["config.json asks for"],
    "config of endless layers": ["num_hidden_layers is 1000000000", "layer 3"],
    "config without quantization": ["FP8", "config.json"],
    "config that is a list": ["model_type"],
    "config with other blocks": ["[64, 64]", "[128, 128]"],
    "no config": ["config.json"],
}


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("what", [what for what in BAD if what not in LOADED])
def test_bad_checkpoints_are_refused_in_one_line(made, copy, what):
    damage, words = BAD[what]
    folder = copy("fp8")
    damage(folder)
    for wanted in (FP8Config(keep=True), FP8Config()):
        with pytest.raises((ValueError, OSError)) as caught:
            load(folder, quantization_config=wanted)
        text = str(caught.value)
        assert "\n" not in text and all(word in text for word in OTHER_WORDS.get(what, words)), text


def test_a_link_to_nothing_and_a_pipe_do_not_hang(copy):
    folder = copy("bf16")
    path = shard(folder)
    path.unlink()
    path.symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match="link to nothing"):
        load(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no regular file"):
        load(folder)


def status(field):
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("name", ["fp8", "bf16"])
@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 10**12},
        {"n_routed_experts": 10**9},
        {"moe_intermediate_size": 10**9},
        {"num_hidden_layers": 10**6},
        {"n_routed_experts": 8},
    ],
    ids=str,
)
def test_sizes_that_contradict_the_files_allocate_nothing(copy, name, values):
    folder = copy(name)
    set_config(folder, **values)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    wanted = {"quantization_config": FP8Config(keep=True)} if name == "fp8" else {}
    with pytest.raises(ValueError, match=next(iter(values)) + "|config.json asks for|holds no FP8 codes"):
        load(folder, **wanted)
    assert status("VmHWM") - before < 200_000


def test_integers_are_no_weights(copy):
    folder = copy("bf16")
    edit(folder, "model.norm.weight", torch.Tensor.int)
    with pytest.raises(ValueError, match="model.norm.weight: dtype I32"):
        load(folder)


def test_an_expert_that_is_missing_is_counted(copy):
    folder = copy("bf16")
    remove(folder, "model.layers.1.mlp.experts.2.up_proj.weight")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: the files hold 3 of the 4 up_proj"):
        load(folder)


def test_another_shape_is_transformers_business_where_it_is_asked_to_be(copy):
    folder = copy("bf16")
    edit(folder, "lm_head.weight", lambda tensor: tensor[:-1])
    with pytest.raises(ValueError, match="lm_head.weight: shape"):
        load(folder)
    assert load(folder, ignore_mismatched_sizes=True).lm_head.weight.shape == (264, 256)


def test_fewer_layers_can_be_asked_for(made):
    assert len(load(made / "bf16", num_hidden_layers=1, num_nextn_predict_layers=0).model.layers) == 1


def test_rank_files_are_told_apart(made):
    with pytest.raises(ValueError, match="model0-mp2.safetensors.*deepseek-v3 convert"):
        load(made / "inference")


def test_a_lone_file_counts_before_an_index_beside_it(made, copy):
    """As transformers chooses: a small model saved over a sharded one."""
    folder = copy("bf16")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / INDEX).write_text("{")
    assert load(folder).config.hidden_size == CONFIG["hidden_size"]


@FEW
@given(data=st.data())
def test_random_damage_is_refused_or_harmless(made, tmp_path_factory, data):
    """Bytes changed in the index or a header: a model, or an error that names the file or the tensor."""
    root = tmp_path_factory.mktemp("fuzz")
    folder = Path(shutil.copytree(made / "bf16", root / "bf16"))
    path = data.draw(st.sampled_from([folder / INDEX, shard(folder, 0)]))
    raw = bytearray(path.read_bytes())
    end = len(raw) if path.suffix == ".json" else 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.sampled_from(list(b'0123456789"{}[],:x \xff\x00-')))
    path.write_bytes(raw)
    try:
        load(folder)
    except ValueError as error:
        assert "\n" not in str(error) and ("model" in str(error) or "tensor" in str(error))
    shutil.rmtree(root)
