"""Comparing checkpoints, and looking at them: what is found, what is missed by no one."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import CONFIG, command, read_all
from safetensors.torch import load_file, save_file

from deepseek_v3.configuration.presets import PRESETS
from deepseek_v3.conversion import CheckpointError, compare, convert, inspect, open_checkpoint, write_checkpoint
from deepseek_v3.conversion.report import readable


def change(folder, name, edit):
    """Replace one tensor of a folder by `edit(tensor)`; None removes it (from the index as well)."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    new = edit(tensors[name])
    if new is None:
        del tensors[name], index["weight_map"][name]
        index_path.write_text(json.dumps(index))
    else:
        tensors[name] = new.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def add_to(value, row, column, amount):
    value = value.clone()
    value[row, column] += amount
    return value


def put_byte(tensor, high):
    """The last element a zero, its sign bit as in `high`."""
    tensor = tensor.clone()
    raw = tensor.view(torch.uint8).view(-1)
    raw[-tensor.element_size() :] = 0
    raw[-1] = high
    return tensor


DENSE = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("a", ["fp8", "bf16", "fused", "inference"])
@pytest.mark.parametrize("b", ["fp8", "bf16", "fused", "inference"])
def test_every_form_of_one_model_is_identical(made, a, b):
    result = compare(made / a, made / b, workers=0)
    assert result.agrees(exact=True)
    counts = {part: (row["identical"], row["error"]) for part, row in result.parts.items()}
    assert counts["routed_experts"] == (12, 0) and counts["mtp"][0] == 6 + 9 + 2 + 15
    assert sum(number for number, _ in counts.values()) == len(
        [name for name in read_all(made / "fp8") if not name.endswith("_scale_inv")]
    )


def test_rounding_is_told_from_damage(made, copy, tmp_path):
    write_checkpoint(CONFIG, tmp_path / "bf16", quantized=False, seed=5)
    convert(tmp_path / "bf16", tmp_path / "fp8", "fp8", workers=0)
    convert(tmp_path / "bf16", tmp_path / "ue8m0", "fp8", scale_fmt="ue8m0", workers=0)
    for other in ("fp8", "ue8m0"):
        result = compare(tmp_path / "bf16", tmp_path / other, workers=0)
        assert result.agrees() and not result.agrees(exact=True) and DENSE in result.rounded
        exact = read_all(tmp_path / "bf16")[DENSE].float()
        found = read_all(tmp_path / other)
        scale = found[f"{DENSE}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        error = ((found[DENSE].float() * scale).bfloat16().float() - exact).abs().max()
        assert result.rounded[DENSE] == pytest.approx(error.item(), rel=1e-6)
    assert compare(tmp_path / "fp8", tmp_path / "ue8m0", workers=0).agrees()
    # One weight off by a tenth of a percent of the largest, in a block's last row.
    change(tmp_path / "fp8", f"{DENSE}_scale_inv", lambda s: add_to(s, 3, 1, s[3, 1] / 4))
    result = compare(tmp_path / "bf16", tmp_path / "fp8", workers=0)
    assert not result.agrees() and list(result.problems) == [DENSE]


@pytest.mark.parametrize("name", [DENSE, "model.layers.1.mlp.experts.3.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("other", ["fused", "inference", "bf16"])
def test_a_single_changed_bit_shows(made, copy, name, other):
    folder = copy("bf16")

    def flip(tensor):
        raw = tensor.clone().view(torch.int16)
        raw.view(-1)[-1] ^= 1
        return raw.view(torch.bfloat16)

    change(folder, name, flip)
    result = compare(folder, made / other, workers=0)
    assert not result.agrees(exact=True)
    # Against FP8 codes a BF16 bit is within what FP8 rounds, and said to be.
    against_codes = other == "inference" and name != "model.norm.weight"
    assert list(result.rounded if against_codes else result.problems) == [name]
    assert result.agrees() == against_codes


def test_checksums_are_of_the_values_whatever_their_form(made, copy, capsys):
    plain = {name: tensor.float() for name, tensor in read_all(made / "bf16").items()}
    expected = {n: hashlib.blake2b(t.numpy().tobytes(), digest_size=8).hexdigest() for n, t in plain.items()}
    for other in ("fp8", "fused", "inference", "bf16"):
        result = compare(made / "bf16", made / other, workers=0, checksums=True)
        assert {name: outcome.checksums for name, outcome in result.tensors.items()} == {
            name: (digest, digest) for name, digest in expected.items()
        }
    folder = copy("fp8")
    change(folder, f"{DENSE}_scale_inv", lambda s: s * 2)
    assert command("verify", made / "bf16", folder, "--checksums", "--workers", 0) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0] in expected}
    assert rows.keys() == expected.keys()
    assert {name for name, row in rows.items() if row[2] != row[3]} == {DENSE}
    assert rows[DENSE][0] == "different" and float(rows[DENSE][1]) > 0 and rows[DENSE][2] == expected[DENSE]
    assert all(row == ["identical", "0", expected[n], expected[n]] for n, row in rows.items() if n != DENSE)
    assert command("verify", made / "bf16", folder, "--checksums", "--json", "--workers", 0) == 1
    found = json.loads(capsys.readouterr().out)["tensors"]
    assert found[DENSE]["status"] == "different" and found[DENSE]["checksums"] == rows[DENSE][2:]


def test_the_sign_of_a_zero_is_a_difference(made, copy):
    for name, found in (("bf16", "problems"), ("fp8", "rounded")):
        sides = [copy(name), None]
        change(sides[0], DENSE, lambda t: put_byte(t, 0))
        sides[1] = Path(shutil.copytree(sides[0], sides[0].parent / f"{name}-negative"))
        change(sides[1], DENSE, lambda t: put_byte(t, 0x80))
        result = compare(*sides, workers=0, checksums=True)
        assert list(getattr(result, found)) == [DENSE] and not result.agrees(exact=True)
        assert len(set(result.tensors[DENSE].checksums)) == 2 and result.tensors[DENSE].error == 0


def test_nan_differs_from_everything(made, copy):
    folder = copy("bf16")
    change(folder, "model.norm.weight", lambda t: torch.full_like(t, float("nan")))
    result = compare(made / "bf16", folder, workers=0)
    assert list(result.problems) == ["model.norm.weight"] and result.parts["norms"]["error"] == float("inf")
    json.loads(json.dumps(result.as_dict(), allow_nan=False))


def test_the_same_codes_under_other_scales_differ(made, copy):
    folder = copy("fp8")
    change(folder, f"{DENSE}_scale_inv", lambda s: add_to(s, 0, 0, s[0, 0]))
    result = compare(made / "fp8", folder, workers=0)
    assert list(result.problems) == [DENSE]
    block = read_all(made / "bf16")[DENSE][:128, :128].float()
    assert result.parts["dense_mlp"]["error"] == block.abs().max()


def test_names_shapes_and_dtypes(made, copy):
    folder = copy("bf16")
    change(folder, "lm_head.weight", lambda t: None)
    change(folder, "model.norm.weight", lambda t: t[:-1])
    change(folder, "model.layers.0.input_layernorm.weight", lambda t: t.view(torch.int16))
    problems = compare(made / "fp8", folder, workers=0).problems
    assert problems["lm_head.weight"] == "only in the first"
    assert "shape [256] against [255]" in problems["model.norm.weight"]
    assert "BF16 against I16" in problems["model.layers.0.input_layernorm.weight"]
    assert len(problems) == 3
    assert compare(folder, made / "fp8", workers=0).problems["lm_head.weight"] == "only in the second"


def test_workers_find_the_same(made, copy):
    folder = copy("fp8")
    change(folder, f"{DENSE}_scale_inv", lambda s: s * 2)
    assert compare(made / "bf16", folder, workers=2) == compare(made / "bf16", folder, workers=0)


def test_mtp_can_be_left_out(made, tmp_path):
    convert(made / "fp8", tmp_path / "ranks", "inference", model_parallel=2, workers=0)
    assert compare(made / "fp8", tmp_path / "ranks", workers=0, without_mtp=True).agrees(exact=True)
    result = compare(made / "fp8", tmp_path / "ranks", workers=0)
    assert len(result.problems) == 32 and all("model.layers.2." in name for name in result.problems)


def test_verification_after_converting(made, tmp_path):
    report = convert(made / "fp8", tmp_path / "ranks", "inference", model_parallel=2, workers=0, verify=True)
    assert report.comparison is not None and report.comparison.agrees(exact=True) and report.verified
    convert(made / "fp8", tmp_path / "bf16", "bf16", workers=0)
    info = open_checkpoint(tmp_path / "bf16")[DENSE]
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        low = file.read(1)[0]
        file.seek(info.offset)
        file.write(bytes([low ^ 1]))
    # What has only to be dequantised must be exact to the last bit.
    again = convert(made / "fp8", tmp_path / "bf16", "bf16", workers=0, resume=True, verify=True)
    assert again.verified is False
    write_checkpoint(CONFIG, tmp_path / "plain", quantized=False)
    assert convert(tmp_path / "plain", tmp_path / "fp8", "fp8", workers=0, verify=True).verified


def test_commands_and_their_exit_codes(made, copy, tmp_path, capsys):
    assert command("verify", made / "fp8", made / "fused", "--workers", 0) == 0
    assert "agree" in capsys.readouterr().out
    folder = copy("bf16")
    change(folder, "model.norm.weight", lambda t: t * 2)
    assert command("verify", made / "fp8", folder, "--workers", 0, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["agrees"] and list(found["problems"]) == ["model.norm.weight"]
    assert command("convert", made / "fp8", tmp_path / "out", "--to", "bf16", "--workers", 0, "--verify") == 0
    output = capsys.readouterr()
    assert "routed_experts" in output.out and "model-00004-of-000004.safetensors" in output.out
    assert output.err == ""
    assert command("convert", made / "fp8", tmp_path / "out", "--to", "bf16", "--workers", 0) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("deepseek-v3 convert: ") and output.err.count("\n") == 1
    assert command("inspect", made / "fp8", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "official"
    assert command("inspect", tmp_path / "nothing") == 2


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (99, "99 B"), (1234, "1.23 kB"), (283_776, "0.28 MB"), (99_000_000, "99.00 MB"), (10**8, "0.10 GB")]
    + [(1_342_000_000_000, "1,342.00 GB")],
)
def test_sizes_are_printed_in_a_unit_that_shows_them(nbytes, text):
    assert readable(nbytes) == text


@pytest.mark.parametrize(("word", "size"), [("5GB", 5 * 10**9), ("7m", 7 * 10**6), ("12", 12), ("3 K", 3000)])
def test_sizes(word, size):
    from deepseek_v3.conversion.commands import _size

    assert _size(word) == size


@pytest.mark.parametrize("word", ["", "GB", "0", "-1", "1.5GB", "9" * 40, "5PB"])
def test_sizes_that_are_none(word, made, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        command("convert", made / "fp8", tmp_path / "x", "--to", "bf16", f"--shard-size={word}")
    assert caught.value.code == 2 and "no size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "layout", "precision"),
    [
        ("fp8", "official", "fp8"),
        ("bf16", "official", "bf16"),
        ("fused", "fused", "bf16"),
        ("inference", "inference", "fp8"),
    ],
)
def test_inspection_of_each_layout(made, name, layout, precision):
    found = inspect(made / name)
    assert (found.layout, found.precision, found.sound) == (layout, precision, True)
    assert (found.mtp_announced, found.mtp_found, found.preset) == (1, 1, None)
    official = {n: t for n, t in read_all(made / "fp8").items() if not n.endswith("_scale_inv")}
    assert found.parameters["total"] == dict.fromkeys(("found", "expected"), sum(t.numel() for t in official.values()))
    experts = sum(t.numel() for n, t in official.items() if ".experts." in n and "layers.1." in n)
    assert found.parameters["routed_experts"]["found"] == experts
    stored = sum(entry["bytes"] for entry in found.dtypes.values())
    assert 0 < found.file_bytes - stored < 100_000
    copies = 2 * 264 * 256
    numbers = sum(t.numel() for t in official.values()) - copies
    assert found.needs["bf16"]["weights"] == 2 * numbers + 2 * 8
    assert ("fp8" in found.needs) == (precision == "fp8")
    if precision == "fp8":
        fp8 = sum(t.numel() * t.element_size() for t in read_all(made / "fp8").values())
        assert found.needs["fp8"]["weights"] == fp8 - 2 * copies
    matrices = sum(t.numel() for t in read_all(made / "fp8").values() if t.dtype == torch.float8_e4m3fn)
    rest = found.needs["bf16"]["weights"] - 2 * matrices
    assert found.needs["nf4"]["weights"] == pytest.approx(rest + matrices * (0.5 + 1 / 64 + 1 / 4096), abs=1)
    shards = 2 * max(path.stat().st_size for path in (made / name).glob("*.safetensors"))
    for need in found.needs.values():
        assert need["host_to_load"] == need["weights"] + shards and need["host_for_gpu"] == shards
        assert need["cache"] > 0
    assert "sound" in found.text() and layout in found.text() and "nf4" in found.text()


def test_the_estimate_of_nf4_is_what_bitsandbytes_needs(made):
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(torch.randn(1024, 2048), quant_type="nf4", compress_statistics=True)
    nbytes = sum(t.numel() * t.element_size() for t in (codes, state.absmax, state.state2.absmax))
    small, large = (inspect(made / name).needs for name in ("fp8", "bf16"))
    assert small["nf4"] == {**large["nf4"], **{k: small["nf4"][k] for k in ("host_to_load", "host_for_gpu")}}
    matrices = sum(t.numel() for t in read_all(made / "fp8").values() if t.dtype == torch.float8_e4m3fn)
    saved = small["bf16"]["weights"] - small["nf4"]["weights"]
    assert saved == pytest.approx(matrices * (2 - nbytes / 1024 / 2048), rel=1e-6)


def test_inspection_finds_what_is_wrong(made, copy, capsys):
    folder = copy("fp8")
    change(folder, "lm_head.weight", lambda t: None)
    change(folder, "model.norm.weight", lambda t: t[:-1])
    change(folder, f"{DENSE}_scale_inv", lambda t: t.double())
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    assert found.missing == ["lm_head.weight"]
    assert set(found.misshapen) == {"model.norm.weight", f"{DENSE}_scale_inv"}
    assert len(found.unexpected) == len([n for n in read_all(made / "fp8") if n.startswith("model.layers.2.")])
    assert not found.sound and (found.mtp_announced, found.mtp_found) == (0, 1)
    assert command("inspect", folder) == 1
    text = capsys.readouterr().out
    assert "missing: lm_head.weight" in text and "more unexpected" in text


def test_inspection_without_a_config(copy):
    folder = copy("fp8")
    (folder / "config.json").unlink()
    found = inspect(folder)
    assert found.preset is None and found.parameters["total"]["expected"] is None and found.mtp_found == 1
    ranks = copy("inference")
    (ranks / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json"):
        inspect(ranks)


@pytest.mark.parametrize("name", ["kimi-k2", "moonlight-16b-a3b"])
def test_published_models_are_recognised(tmp_path, name):
    raw = PRESETS[name]
    write_checkpoint(raw, tmp_path / "x", quantized="quantization_config" in raw, sparse=True)
    found = inspect(tmp_path / "x")
    assert found.sound and found.preset == name and found.scale_fmt is None


def test_a_relative_of_the_same_sizes_is_told_by_its_scales(published, tmp_path):
    """V3.1's files have V3's headers, as it is V3 trained on."""
    for path in published.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["deepseek-v3.1"]))
    found = inspect(tmp_path)
    assert found.sound and found.preset == "deepseek-v3.1" and found.scale_fmt == "ue8m0"
