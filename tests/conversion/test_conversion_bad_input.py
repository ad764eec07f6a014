"""Bad checkpoints through the commands: one line with file, tensor and remedy, exit code 2, nothing written."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from checkpoint_files import CONFIG, command, edit_header, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KV = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
SCALE = f"{KV}_scale_inv"
INDEX = "model.safetensors.index.json"


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def holder(folder, name):
    """Path of the file that holds a tensor."""
    return folder / index_of(folder)["weight_map"][name]


def edit(folder, name, change):
    path = holder(folder, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def remove(folder, name):
    path, index = holder(folder, name), index_of(folder)
    tensors = load_file(path)
    del tensors[name], index["weight_map"][name]
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


def add(folder, name, tensor):
    index = index_of(folder)
    file = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"][name] = file
    tensors = load_file(folder / file)
    save_file({**tensors, name: tensor}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


def set_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in values.items():
        if value is ...:
            config.pop(key)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def put(value, row=-1, column=-1):
    def change(tensor):
        tensor = tensor.clone()
        tensor[row, column] = value
        return tensor

    return change


def shard(folder, number=1):
    return sorted(folder.glob("model-*.safetensors"))[number]


def truncate(folder):
    path = shard(folder)
    os.truncate(path, path.stat().st_size - 100)


def absurd(folder):
    raw = shard(folder).read_bytes()
    shard(folder).write_bytes(struct.pack("<Q", 1 << 60) + raw[8:])


def long_header(folder):
    raw = shard(folder).read_bytes()
    shard(folder).write_bytes(struct.pack("<Q", len(raw)) + raw[8:])


def overlap(folder):
    def change(header):
        entry = header["model.norm.weight"]
        entry["data_offsets"] = [value - 2 for value in entry["data_offsets"]]

    edit_header(holder(folder, "model.norm.weight"), change)


def pickled(folder):
    torch.save({"a": torch.zeros(3)}, shard(folder))


def outside(folder):
    path = shard(folder)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def duplicate(folder):
    first, second = shard(folder, 0), shard(folder, 1)
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second, metadata={"format": "pt"})


def point_to(target):
    def change(folder):
        index = index_of(folder)
        index["weight_map"]["model.norm.weight"] = target
        (folder / INDEX).write_text(json.dumps(index))

    return change


BAD = {
    "truncated shard": (truncate, ["model-00002", "cut short"]),
    "header longer than the file": (long_header, ["model-00002", "longer than the file"]),
    "absurd header size": (absurd, ["model-00002", str(1 << 60)]),
    "overlapping offsets": (overlap, ["model.norm.weight", "overlaps"]),
    "pickle": (pickled, ["model-00002", "pickle", "save_pretrained"]),
    "link out": (outside, ["model-00002", "link out"]),
    "duplicate": (duplicate, ["model-00002", "stands in model-00001"]),
    "missing file": (point_to("model-00009.safetensors"), ["model-00009", "does not exist"]),
    "path upwards": (point_to("../../etc/passwd"), [INDEX, "plain file name"]),
    "absolute path": (point_to("/etc/passwd"), [INDEX, "plain file name"]),
    "wrong shape": (lambda f: edit(f, "model.norm.weight", lambda t: t[:-1]), ["model.norm.weight", "[255]", "[256]"]),
    "wrong dtype": (
        lambda f: edit(f, "model.norm.weight", torch.Tensor.float),
        ["model.norm.weight", "F32", "bfloat16"],
    ),
    "fp8 of another kind": (lambda f: edit(f, KV, lambda t: t.view(torch.float8_e5m2)), [KV, "F8_E5M2"]),
    "missing scale": (lambda f: remove(f, SCALE), [SCALE, "scale of this matrix is missing"]),
    "missing tensor": (lambda f: remove(f, "lm_head.weight"), ["lm_head.weight", "missing"]),
    "missing mtp tensor": (
        lambda f: remove(f, "model.layers.2.hnorm.weight"),
        ["model.layers.2.hnorm.weight", "missing"],
    ),
    "scale NaN": (lambda f: edit(f, SCALE, put(float("nan"))), [SCALE, "[1, 1] is nan"]),
    "scale infinite": (lambda f: edit(f, SCALE, put(float("inf"))), [SCALE, "inf"]),
    "scale zero": (lambda f: edit(f, SCALE, put(0.0, 0, 1)), [SCALE, "[0, 1] is 0.0"]),
    "scale negative": (lambda f: edit(f, SCALE, put(-0.5)), [SCALE, "-0.5"]),
    "scale of the wrong shape": (lambda f: edit(f, SCALE, lambda t: t[:1]), [SCALE, "[1, 2]", "[2, 2]"]),
    "NaN codes": (
        lambda f: edit(f, KV, lambda t: put(0x7F)(t.view(torch.uint8)).view(torch.float8_e4m3fn)),
        [KV, "NaN"],
    ),
    "unknown tensor": (
        lambda f: add(f, "model.extra.weight", torch.ones(2)),
        ["model.extra.weight", "--drop-unknown"],
    ),
    "layer of no number": (
        lambda f: add(f, "model.layers.x.enorm.weight", torch.ones(2)),
        ["model.layers.x.enorm.weight"],
    ),
    "config without a size": (lambda f: set_config(f, hidden_size=...), ["config.json", "hidden_size"]),
    "config with a silly size": (lambda f: set_config(f, hidden_size="256"), ["config.json", "hidden_size"]),
    "config with another size": (
        lambda f: set_config(f, hidden_size=512),
        ["model.embed_tokens.weight", "[264, 512]"],
    ),
    "config of endless layers": (lambda f: set_config(f, num_hidden_layers=10**9), ["config.json", "layers"]),
    "config without quantization": (
        lambda f: set_config(f, quantization_config=...),
        ["config.json", "quantization_config"],
    ),
    "config with other blocks": (
        lambda f: set_config(f, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ["config.json", "[64, 64]", "128x128"],
    ),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "missing", "--config"]),
}


BLIND = ("scale NaN", "scale infinite", "scale zero", "scale negative", "NaN codes", "no config")


def assert_named(output, code, culprit):
    """One line with a remedy where a folder is refused, the findings where it is read; both name file or tensor."""
    assert output.err.count("\n") == (code == 2)
    if code == 2:
        assert culprit in output.err and "; " in output.err, output.err
    elif code == 1:
        assert culprit in output.out or "contradiction: config.json" in output.out, output.out


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints(made, copy, tmp_path, capsys, what):
    damage, words = BAD[what]
    folder = copy("fp8")
    damage(folder)
    before = snapshot(folder)
    assert command("convert", folder, tmp_path / "out", "--to", "bf16", "--workers", 0) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and output.err.startswith("deepseek-v3 convert: "), output.err
    assert all(word in output.err for word in words) and "; " in output.err, output.err
    assert not (tmp_path / "out").exists()
    assert snapshot(folder) == before
    # Looking at headers alone finds it, too, unless it lies in the values.
    code = command("inspect", folder)
    assert (code != 0) == (what not in BLIND)
    assert_named(capsys.readouterr(), code, words[0])
    # Comparing asks for no config.json and takes a number for what it is in any dtype; all else is seen.
    code = command("verify", folder, made / "fp8", "--workers", 0)
    assert code in ((0, 2) if "config" in what or what == "wrong dtype" else (1, 2))
    # A scale is compared as a part of its matrix.
    assert_named(capsys.readouterr(), code, words[0].removesuffix("_scale_inv"))


def test_bf16_with_a_quantization_config(copy, tmp_path, capsys):
    """What DeepSeek's own cast script leaves behind when the old config.json is copied along."""
    folder = copy("bf16")
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert command("convert", folder, tmp_path / "out", "--to", "fp8", "--workers", 0) == 2
    assert "remove quantization_config" in capsys.readouterr().err
    assert command("inspect", folder) == 1
    assert "contradiction" in capsys.readouterr().out


def test_unknown_tensors_can_be_dropped(made, copy, tmp_path):
    folder = copy("fp8")
    add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(32))
    assert (
        command("convert", folder, tmp_path / "out", "--to", "bf16", "--workers", 0, "--drop-unknown", "--quiet") == 0
    )
    assert command("verify", tmp_path / "out", made / "bf16", "--exact", "--workers", 0) == 0


def test_ranks_that_contradict_each_other(copy, tmp_path, capsys):
    folder = copy("inference")
    path = folder / "model1-mp2.safetensors"
    tensors = load_file(path)
    name = "layers.0.attn.wo.weight"
    tensors[name] = tensors[name].view(torch.uint8)[:, :-1].contiguous().view(torch.float8_e4m3fn)
    save_file(tensors, path)
    assert command("convert", folder, tmp_path / "out", "--to", "fp8", "--workers", 0) == 2
    assert name in capsys.readouterr().err
    set_config(folder, n_routed_experts=3)
    assert command("convert", folder, tmp_path / "out", "--to", "fp8", "--workers", 0) == 2
    assert "3 experts cannot lie on 2 ranks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fused_experts_of_an_odd_shape(copy, tmp_path, capsys):
    folder = copy("fused")
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for bad in (tensors[name][:, :-1], tensors[name][0], tensors[name][:-1], torch.empty(1 << 40, 2, 0).bfloat16()):
        save_file({**tensors, name: bad.contiguous()}, path, metadata={"format": "pt"})
        assert command("convert", folder, tmp_path / "out", "--to", "bf16", "--workers", 0) == 2
        assert "layers.1.mlp.experts" in capsys.readouterr().err
        assert command("inspect", folder) in (1, 2)
        assert command("verify", folder, folder, "--workers", 0) in (0, 2)
    assert not (tmp_path / "out").exists()


@FEW
@given(data=st.data())
def test_random_damage_never_ends_in_a_traceback(made, tmp_path_factory, data):
    """Bytes changed in index, config or a header: converted as if nothing were, or refused with one line."""
    root = tmp_path_factory.mktemp("fuzz")
    folder = Path(shutil.copytree(made / "fp8", root / "fp8"))
    path = folder / data.draw(st.sampled_from(["config.json", INDEX, shard(folder, 0).name]))
    raw = bytearray(path.read_bytes())
    end = len(raw) if path.suffix == ".json" else 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.sampled_from(list(b'0123456789"{}[],:x \xff\x00-')))
    path.write_bytes(raw)
    code = command("convert", folder, root / "out", "--to", "bf16", "--workers", 0, "--quiet")
    assert code in (0, 2) and (root / "out").exists() == (code == 0)
    assert command("inspect", folder) in (0, 1, 2)
    assert command("verify", folder, made / "fp8", "--workers", 0) in (0, 1, 2)
    shutil.rmtree(root)


@FEW
@given(
    values=st.dictionaries(
        st.sampled_from(
            sorted(k for k, v in CONFIG.items() if isinstance(v, int)) + ["quantization_config", "auto_map"]
        ),
        st.none()
        | st.booleans()
        | st.integers(-3, 10**12)
        | st.floats()
        | st.text(max_size=3)
        | st.just([])
        | st.just({}),
        max_size=3,
    )
)
def test_any_config_is_answered(made, tmp_path_factory, values):
    root = tmp_path_factory.mktemp("config")
    folder = Path(shutil.copytree(made / "fp8", root / "fp8"))
    set_config(folder, **values)
    code = command("convert", folder, root / "out", "--to", "bf16", "--workers", 0, "--quiet")
    assert code in (0, 2) and (root / "out").exists() == (code == 0)
    assert command("inspect", folder) in (0, 1, 2)
    assert command("verify", folder, made / "fp8", "--workers", 0) in (0, 1, 2)
    shutil.rmtree(root)


@FEW
@given(data=st.data())
def test_no_changed_bit_of_a_weight_escapes_an_exact_comparison(made, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("flip")
    original = made / data.draw(st.sampled_from(["fp8", "bf16"]))
    folder = Path(shutil.copytree(original, root / "x"))
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(start, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    assert command("verify", folder, original, "--exact", "--workers", 0) == 1
    code = command("convert", folder, root / "out", "--to", "inference", "--workers", 0, "--quiet")
    assert code in (0, 2) and (root / "out").exists() == (code == 0)
    shutil.rmtree(root)
