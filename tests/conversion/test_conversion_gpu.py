"""`convert --device cuda` gives the CPU's files, byte for byte."""

import json

import pytest
import torch
from checkpoint_files import command, read_all, snapshot
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.gpu

MATRIX = "model.layers.0.mlp.up_proj.weight"


def edit(folder, name, change):
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, metadata={"format": "pt"})


def extreme_scales(scale):
    scale[0, 0], scale[0, 1], scale[1, 0] = 2.0**-133, 1e-37, 1e30
    return scale


def extreme_weights(weight):
    weight[:128, :128] = 0
    weight[128:256, :128] *= 2.0**-125
    weight[:128, 128:] *= 1e30
    return weight


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("fp8", ["--to", "bf16"]),
        ("ue8m0", ["--to", "bf16"]),
        ("fp8", ["--to", "fused"]),
        ("bf16", ["--to", "fp8"]),
        ("bf16", ["--to", "fp8", "--scale-fmt", "ue8m0"]),
        ("bf16", ["--to", "fp8", "--like", "ORIGINAL"]),
    ],
)
def test_the_gpu_writes_what_the_cpu_writes(made, copy, tmp_path, source, options, workers):
    folder = copy(source)
    if source == "bf16":
        edit(folder, MATRIX, extreme_weights)
    else:
        edit(folder, f"{MATRIX}_scale_inv", extreme_scales if source == "fp8" else lambda scale: scale * 2.0**-100)
    options = [made / "fp8" if word == "ORIGINAL" else word for word in options]
    for device in ("cpu", "cuda"):
        assert command("convert", folder, tmp_path / device, *options, "--device", device, "--workers", workers) == 0
    assert snapshot(tmp_path / "cuda") == snapshot(tmp_path / "cpu")
    assert len(read_all(tmp_path / "cuda")) > 40


def test_nan_codes_are_refused_there_too(copy, tmp_path, capsys):
    folder = copy("fp8")

    def spoil(codes):
        codes.view(torch.uint8)[-1, -1] = 0x7F
        return codes

    edit(folder, MATRIX, spoil)
    assert command("convert", folder, tmp_path / "out", "--to", "bf16", "--device", "cuda", "--workers", 0) == 2
    assert f"{MATRIX}: holds NaN codes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
