"""Conversions in every direction, against formulas and loops written here over what the safetensors library reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import CONFIG, read_all, snapshot
from safetensors.torch import save_file

from deepseek_v3.conversion import CheckpointError, compare, convert, inspect, write_checkpoint
from deepseek_v3.conversion.header import ITEM_BYTES, read_header
from deepseek_v3.conversion.steps import Entry, Item, lay_out

SCALE = "_scale_inv"
EXPERTS, RANKS = CONFIG["n_routed_experts"], 2


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def equal(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    wrong = [name for name in expected if not same(found[name], expected[name])]
    assert not wrong, wrong


def dequantised(tensors):
    """BF16 form of FP8 tensors: exact float64 products, rounded by torch's own cast."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = tensor.shape
            scale = (
                tensors[name + SCALE].double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            )
            tensor = (tensor.double() * scale).bfloat16()
        result[name] = tensor
    return result


def sharded(tensors, ranks):
    """DeepSeek's own script, in its own manner: rename by the last but one part of the name, narrow, deal experts."""
    mapping = {
        "embed_tokens": ("embed", 0),
        "input_layernorm": ("attn_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
        "q_a_proj": ("wq_a", None),
        "q_a_layernorm": ("q_norm", None),
        "q_b_proj": ("wq_b", 0),
        "kv_a_proj_with_mqa": ("wkv_a", None),
        "kv_a_layernorm": ("kv_norm", None),
        "kv_b_proj": ("wkv_b", 0),
        "o_proj": ("wo", 1),
        "gate": ("gate", None),
        "gate_proj": ("w1", 0),
        "down_proj": ("w2", 1),
        "up_proj": ("w3", 0),
        "norm": ("norm", None),
        "lm_head": ("head", 0),
    }
    states = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        if "model.layers.2" in name:
            continue
        name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        name = name.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        key = name.split(".")[-2]
        new, dim = mapping[key]
        name = name.replace(key, new)
        for rank in range(ranks):
            part = tensor
            if "experts" in name and "shared_experts" not in name:
                if int(name.split(".")[-3]) // (EXPERTS // ranks) != rank:
                    continue
            elif dim is not None:
                size = tensor.shape[dim] // ranks
                part = tensor.narrow(dim, rank * size, size).contiguous()
            states[rank][name] = part
    return states


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    """Odd shapes, narrow types first in the model's order."""
    shapes = {"a": ("F8_E4M3", (3, 5)), "b": ("BF16", (3,)), "c": ("F32", (1, 1)), "d": ("F8_E4M3", (1, 1))}
    entries = [Entry(name, *form) for name, form in shapes.items()]
    job = lay_out("x.safetensors", [Item((entry,), ()) for entry in entries])
    (tmp_path / job.file).write_bytes(job.header + bytes(job.nbytes - len(job.header)))
    for info in read_header(tmp_path / job.file).tensors.values():
        assert info.offset % ITEM_BYTES[info.dtype] == 0


@pytest.mark.parametrize("name", ["fp8", "ue8m0"])
def test_fp8_to_bf16(made, tmp_path, name):
    report = convert(made / name, tmp_path / "out", "bf16", workers=0)
    tensors = read_all(tmp_path / "out")
    equal(tensors, dequantised(read_all(made / name)))
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16" and "auto_map" not in config
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    # The files keep their names and their tensors.
    source = json.loads((made / name / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(source[tensor] == file for tensor, file in index["weight_map"].items())
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_bf16_to_fp8(made, tmp_path, scale_fmt):
    convert(made / "bf16", tmp_path / "out", "fp8", scale_fmt=scale_fmt, workers=0)
    source, found, pattern = read_all(made / "bf16"), read_all(tmp_path / "out"), read_all(made / "fp8")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in pattern.items()}
    for name, tensor in found.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype != torch.float8_e4m3fn:
            assert same(tensor, source[name])
            continue
        weights, scale = source[name].float(), found[name + SCALE]
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                here = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
                expected = weights[here].abs().max() / 448
                if scale_fmt:
                    expected = torch.exp2(torch.log2(expected).ceil())
                assert scale[row, column] == expected
                assert same(tensor[here].contiguous(), (weights[here] / expected).to(torch.float8_e4m3fn))
    assert config_of(tmp_path / "out")["quantization_config"].get("scale_fmt") == scale_fmt


def test_fp8_comes_back_from_bf16(made, tmp_path):
    """All codes; the scales bit for bit with the original at hand, else to BF16's precision."""
    convert(made / "bf16", tmp_path / "alone", "fp8", workers=0)
    convert(made / "bf16", tmp_path / "like", "fp8", like=made / "fp8", workers=0)
    original, alone = read_all(made / "fp8"), read_all(tmp_path / "alone")
    equal(read_all(tmp_path / "like"), original)
    for name, tensor in original.items():
        if name.endswith(SCALE):
            assert torch.allclose(alone[name], tensor, rtol=2.0**-8, atol=0)
        else:
            assert same(alone[name], tensor), name


def test_only_touched_tensors_are_requantised(made, copy, tmp_path):
    from safetensors.torch import load_file, save_file

    tuned = copy("bf16")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    path = tuned / json.loads((tuned / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][130, 7] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    convert(tuned, tmp_path / "out", "fp8", like=made / "fp8", workers=0)
    found, original = read_all(tmp_path / "out"), read_all(made / "fp8")
    touched = {tensor for tensor in found if not same(found[tensor], original[tensor])}
    assert name in touched and touched <= {name, name + SCALE}


def test_fused_and_back(made, tmp_path):
    official, fused = dequantised(read_all(made / "fp8")), read_all(made / "fused")
    expected = {name: tensor for name, tensor in official.items() if ".experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        part = {k: [official[f"{prefix}.{e}.{k}_proj.weight"] for e in range(EXPERTS)] for k in ("gate", "up", "down")}
        pairs = zip(part["gate"], part["up"], strict=True)
        expected[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        expected[f"{prefix}.down_proj"] = torch.stack(part["down"])
    equal(fused, expected)
    convert(made / "fused", tmp_path / "back", "bf16", workers=0)
    equal(read_all(tmp_path / "back"), official)
    convert(made / "bf16", tmp_path / "again", "fused", workers=0)
    assert snapshot(tmp_path / "again") == snapshot(made / "fused")
    convert(made / "fused", tmp_path / "fp8", "fp8", like=made / "fp8", workers=0)
    equal(read_all(tmp_path / "fp8"), read_all(made / "fp8"))


def stacked(tensors):
    """Experts' codes and scales as transformers stacks them: gate above up, each with its own rows of blocks."""
    result = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for prefix in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        for suffix in ("", SCALE):
            parts = {
                part: [tensors[f"{prefix}.experts.{e}.{part}_proj.weight{suffix}"] for e in range(EXPERTS)]
                for part in ("gate", "up", "down")
            }
            both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
            result[f"{prefix}.experts.gate_up_proj{suffix}"] = torch.stack(both)
            result[f"{prefix}.experts.down_proj{suffix}"] = torch.stack(parts["down"])
    return result


@pytest.mark.parametrize("width", [256, 160])
def test_stacks_of_codes_are_read_in_every_direction(width, tmp_path):
    """What `save_pretrained(save_original_format=False)` writes of a model whose FP8 was kept."""
    official = tmp_path / "fp8"
    write_checkpoint({**CONFIG, "moe_intermediate_size": width}, official, shards=2)
    (tmp_path / "stacked").mkdir()
    shutil.copy(official / "config.json", tmp_path / "stacked")
    tensors = stacked(read_all(official))
    save_file(tensors, tmp_path / "stacked" / "model.safetensors", metadata={"format": "pt"})
    assert inspect(tmp_path / "stacked").sound
    assert compare(tmp_path / "stacked", official, workers=0).agrees(exact=True)
    convert(tmp_path / "stacked", tmp_path / "again", "fp8", workers=0)
    equal(read_all(tmp_path / "again"), read_all(official))
    convert(tmp_path / "stacked", tmp_path / "bf16", "bf16", workers=0)
    equal(read_all(tmp_path / "bf16"), dequantised(read_all(official)))
    convert(tmp_path / "stacked", tmp_path / "fused", "fused", workers=0)
    convert(official, tmp_path / "expected", "fused", workers=0)
    equal(read_all(tmp_path / "fused"), read_all(tmp_path / "expected"))
    name = next(name for name in tensors if name.endswith(f"gate_up_proj{SCALE}"))
    for bad in (tensors[name][:, :-1], tensors[name][0], tensors[name][:-1], tensors[name][..., :-1]):
        save_file({**tensors, name: bad.contiguous()}, tmp_path / "stacked" / "model.safetensors")
        with pytest.raises(CheckpointError, match="layers.*experts"):
            convert(tmp_path / "stacked", tmp_path / "refused", "bf16", workers=0)
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_inference_shards_as_deepseek_s_script_makes_them(made, tmp_path, name):
    convert(made / name, tmp_path / "out", "inference", model_parallel=RANKS, workers=0)
    from safetensors.torch import load_file

    for rank, expected in enumerate(sharded(read_all(made / name), RANKS)):
        equal(load_file(tmp_path / "out" / f"model{rank}-mp{RANKS}.safetensors"), expected)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0


def test_from_inference(made, tmp_path):
    convert(made / "inference", tmp_path / "back", "fp8", layout="inference", workers=0)
    equal(read_all(tmp_path / "back"), read_all(made / "fp8"))
    assert config_of(tmp_path / "back") == config_of(made / "fp8")
    convert(made / "inference", tmp_path / "bf16", "bf16", workers=0)
    equal(read_all(tmp_path / "bf16"), read_all(made / "bf16"))
    # Four ranks straight from two, and all at once in one.
    convert(made / "bf16", tmp_path / "one", "inference", model_parallel=1, keep_mtp=True, workers=0)
    convert(tmp_path / "one", tmp_path / "four", "inference", model_parallel=4, keep_mtp=True, workers=0)
    convert(tmp_path / "four", tmp_path / "round", "bf16", workers=0)
    equal(read_all(tmp_path / "round"), read_all(made / "bf16"))


def test_without_mtp_the_config_says_so(made, tmp_path):
    convert(made / "fp8", tmp_path / "ranks", "inference", model_parallel=2, workers=0)
    shutil.copy(made / "fp8" / "config.json", tmp_path / "ranks" / "config.json")
    report = convert(tmp_path / "ranks", tmp_path / "back", "fp8", workers=0)
    assert any("MTP" in note for note in report.notes)
    assert config_of(tmp_path / "back")["num_nextn_predict_layers"] == 0
    expected = {n: t for n, t in read_all(made / "fp8").items() if not n.startswith("model.layers.2.")}
    equal(read_all(tmp_path / "back"), expected)


def test_a_config_for_ranks_that_have_none(made, copy, tmp_path):
    ranks = copy("inference")
    (ranks / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json.*--config"):
        convert(ranks, tmp_path / "out", "fp8", workers=0)
    convert(ranks, tmp_path / "out", "fp8", config=made / "fp8" / "config.json", workers=0)
    equal(read_all(tmp_path / "out"), read_all(made / "fp8"))


def test_shard_size(made, tmp_path):
    limit = 1_000_000
    convert(made / "fp8", tmp_path / "out", "bf16", shard_bytes=limit, workers=0)
    equal(read_all(tmp_path / "out"), read_all(made / "bf16"))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4 and files[-1].name == f"model-{len(files):05d}-of-{len(files):06d}.safetensors"
    assert all(path.stat().st_size < limit + 20_000 for path in files)


def test_scales_are_never_rounded_to_powers_of_two(made, tmp_path):
    with pytest.raises(CheckpointError, match="powers of two"):
        convert(made / "fp8", tmp_path / "out", "fp8", scale_fmt="ue8m0", workers=0)
    assert not (tmp_path / "out").exists()
    # Scales that are powers of two are recognised without being told.
    plain = Path(shutil.copytree(made / "ue8m0", tmp_path / "plain"))
    config = config_of(plain)
    del config["quantization_config"]["scale_fmt"]
    (plain / "config.json").write_text(json.dumps(config))
    convert(plain, tmp_path / "out", "fp8", scale_fmt="ue8m0", workers=0)
    equal(read_all(tmp_path / "out"), read_all(made / "ue8m0"))
    assert config_of(tmp_path / "out")["quantization_config"]["scale_fmt"] == "ue8m0"


def test_e8m0_scales_and_a_bf16_bias_are_widened(made, copy, tmp_path):
    """What transformers writes for scale_fmt ue8m0, and what it wrote before it kept the router's bias in float32."""
    from safetensors.torch import load_file, save_file

    folder = copy("ue8m0")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(SCALE):
                tensors[name] = tensor.to(torch.float8_e8m0fnu)
            elif name.endswith("e_score_correction_bias"):
                tensors[name] = tensor.bfloat16()
        save_file(tensors, path, metadata={"format": "pt"})
    expected = read_all(made / "ue8m0")
    expected = {n: t.bfloat16().float() if n.endswith("correction_bias") else t for n, t in expected.items()}
    convert(folder, tmp_path / "fp8", "fp8", workers=0)
    equal(read_all(tmp_path / "fp8"), expected)
    convert(folder, tmp_path / "bf16", "bf16", workers=0)
    equal(read_all(tmp_path / "bf16"), dequantised(expected))


def test_workers_write_the_same_bytes(made, tmp_path):
    seen = []
    convert(made / "fp8", tmp_path / "out", "bf16", workers=2, progress=lambda *a: seen.append(a))
    assert snapshot(tmp_path / "out") == snapshot(made / "bf16")
    assert len(seen) == 4 and seen[-1][1] == seen[-1][2]
    convert(made / "bf16", tmp_path / "ranks", "inference", model_parallel=2, keep_mtp=True, workers=2)
    convert(made / "bf16", tmp_path / "ranks0", "inference", model_parallel=2, keep_mtp=True, workers=0)
    assert snapshot(tmp_path / "ranks") == snapshot(tmp_path / "ranks0")


def test_moonlight_shape_without_q_lora_and_mtp(tmp_path):
    config = {**CONFIG, "q_lora_rank": None, "num_nextn_predict_layers": 0, "n_shared_experts": 2, "hidden_size": 192}
    write_checkpoint(config, tmp_path / "bf16", quantized=False)
    convert(tmp_path / "bf16", tmp_path / "fp8", "fp8", workers=0)
    assert compare(tmp_path / "bf16", tmp_path / "fp8", workers=0).agrees()
    convert(tmp_path / "fp8", tmp_path / "ranks", "inference", workers=0)
    names = read_all(tmp_path / "ranks").keys()
    assert "layers.0.attn.wq.weight" in names and "layers.0.attn.wq.scale" in names
    convert(tmp_path / "ranks", tmp_path / "back", "fp8", workers=0)
    equal(read_all(tmp_path / "back"), read_all(tmp_path / "fp8"))


def test_cuts_between_blocks_are_refused(made, tmp_path):
    with pytest.raises(CheckpointError, match="tensor .*4 ranks.*FP8 blocks.*bf16"):
        convert(made / "fp8", tmp_path / "out", "inference", model_parallel=4, workers=0)
    with pytest.raises(CheckpointError, match="4 experts.*3 ranks"):
        convert(made / "fp8", tmp_path / "out", "inference", model_parallel=3, workers=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"to": "gguf"},
        {"to": "bf16", "scale_fmt": "ue8m0"},
        {"to": "fp8", "scale_fmt": "ue4m3"},
        {"to": "bf16", "model_parallel": 2},
        {"to": "inference", "model_parallel": 0},
        {"to": "inference", "shard_bytes": 5},
        {"to": "bf16", "shard_bytes": 0},
        {"to": "bf16", "like": "fp8"},
        {"to": "bf16", "device": "tpu"},
    ],
)
def test_options_that_do_not_fit(made, tmp_path, options):
    if "like" in options:
        options = {**options, "like": made / "fp8"}
    with pytest.raises(CheckpointError):
        convert(made / "fp8", tmp_path / "out", workers=0, **options)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there(made, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="there is no CUDA device; leave --device out"):
        convert(made / "fp8", tmp_path / "out", "bf16", device="cuda", workers=0)
    assert not (tmp_path / "out").exists()


def test_companions_and_remote_code(made, copy, tmp_path):
    folder = copy("fp8")
    kept = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.TikToken", None]}}),
        "tokenization_x.py": "class TikToken: pass\n",
        "generation_config.json": '{"temperature": 0.6}',
        "LICENSE": "terms",
        "tiktoken.model": "ranks",
        "chat_template.jinja": "{{ x }}",
    }
    left = {"modeling_deepseek.py": "raise SystemExit", "training_args.bin": "pickle", "notes.txt": "x", ".git": "x"}
    for name, text in (kept | left).items():
        (folder / name).write_text(text)
    foreign = config_of(folder) | {"auto_map": CONFIG["auto_map"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(foreign))
    convert(folder, tmp_path / "plain", "bf16", workers=0)
    config = config_of(tmp_path / "plain")
    assert "auto_map" not in config and config["dtype"] == config["torch_dtype"] == "bfloat16"
    convert(folder, tmp_path / "out", "bf16", remote_code=True, workers=0)
    found = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert all(found[name].read_text() == text for name, text in kept.items())
    assert not left.keys() & found.keys()
    auto_map = config_of(tmp_path / "out")["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "remote_deepseek_v3.DeepseekV3ForCausalLM"
    names: dict = {}
    exec(found["remote_deepseek_v3.py"].read_text(), names)
    assert all(value.split(".")[1] in names for value in auto_map.values())
    assert len(found["remote_deepseek_v3.py"].read_text().strip().splitlines()) == 2


def test_remote_code_gives_trust_remote_code_users_these_classes(made, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

    import deepseek_v3

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    convert(made / "fp8", tmp_path / "out", "bf16", remote_code=True, workers=0)
    # As in a process that never imported the package: only the auto_map leads to it.
    deepseek_v3.unregister()
    try:
        native = AutoConfig.from_pretrained(made / "bf16")
        config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    finally:
        deepseek_v3.register()
    assert type(native).__module__.startswith("transformers.")
    assert type(config).__module__.startswith("deepseek_v3.") and type(model).__module__.startswith("deepseek_v3.")
    expected = read_all(made / "bf16")["model.layers.0.mlp.down_proj.weight"]
    assert same(model.model.layers[0].mlp.down_proj.weight.detach(), expected)
