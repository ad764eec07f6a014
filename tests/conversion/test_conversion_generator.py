"""The generated checkpoints against the published layout: names, shapes, dtypes, placement, counts."""

import json
import math
import re

import pytest
import torch
from checkpoint_files import CONFIG, read_all, snapshot
from safetensors import safe_open

from deepseek_v3.configuration.presets import PRESETS
from deepseek_v3.conversion import CheckpointError, inspect, open_checkpoint, write_checkpoint

# The published files' table: pattern, shape from the configuration, whether it is stored in FP8.
D, F, DENSE, H = 256, 256, 512, 4
TABLE = [
    (r"model\.embed_tokens\.weight|lm_head\.weight", (264, D), False),
    (r"model\.norm\.weight", (D,), False),
    (r"model\.layers\.[0-2]\.(input|post_attention)_layernorm\.weight", (D,), False),
    (r"model\.layers\.[0-2]\.self_attn\.q_a_proj\.weight", (160, D), True),
    (r"model\.layers\.[0-2]\.self_attn\.q_a_layernorm\.weight", (160,), False),
    (r"model\.layers\.[0-2]\.self_attn\.q_b_proj\.weight", (H * 192, 160), True),
    (r"model\.layers\.[0-2]\.self_attn\.kv_a_proj_with_mqa\.weight", (192, D), True),
    (r"model\.layers\.[0-2]\.self_attn\.kv_a_layernorm\.weight", (128,), False),
    (r"model\.layers\.[0-2]\.self_attn\.kv_b_proj\.weight", (H * 256, 128), True),
    (r"model\.layers\.[0-2]\.self_attn\.o_proj\.weight", (D, H * 128), True),
    (r"model\.layers\.0\.mlp\.(gate|up)_proj\.weight", (DENSE, D), True),
    (r"model\.layers\.0\.mlp\.down_proj\.weight", (D, DENSE), True),
    (r"model\.layers\.[12]\.mlp\.gate\.weight", (4, D), False),
    (r"model\.layers\.[12]\.mlp\.experts\.[0-3]\.(gate|up)_proj\.weight", (F, D), True),
    (r"model\.layers\.[12]\.mlp\.experts\.[0-3]\.down_proj\.weight", (D, F), True),
    (r"model\.layers\.[12]\.mlp\.shared_experts\.(gate|up)_proj\.weight", (F, D), True),
    (r"model\.layers\.[12]\.mlp\.shared_experts\.down_proj\.weight", (D, F), True),
    (r"model\.layers\.2\.(embed_tokens|shared_head\.head)\.weight", (264, D), False),
    (r"model\.layers\.2\.(enorm|hnorm|shared_head\.norm)\.weight", (D,), False),
    (r"model\.layers\.2\.eh_proj\.weight", (D, 2 * D), False),
]
BIAS = r"model\.layers\.[12]\.mlp\.gate\.e_score_correction_bias"
COUNT = 3 + 3 * (5 + 2 + 2) + 3 + 2 * (1 + 15) + 6


def test_names_shapes_and_dtypes(made):
    tensors = read_all(made / "fp8")
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    weights = set(tensors) - scales - {name for name in tensors if re.fullmatch(BIAS, name)}
    assert len(weights) == COUNT and len(tensors) == COUNT + len(scales) + 2
    for name in weights:
        ((shape, quantized),) = [(s, q) for pattern, s, q in TABLE if re.fullmatch(pattern, name)]
        tensor = tensors[name]
        assert tuple(tensor.shape) == shape, name
        assert tensor.dtype == (torch.float8_e4m3fn if quantized else torch.bfloat16), name
        assert (f"{name}_scale_inv" in scales) == quantized, name
        if quantized:
            scale = tensors[f"{name}_scale_inv"]
            assert scale.dtype == torch.float32
            assert tuple(scale.shape) == tuple(math.ceil(size / 128) for size in shape), name
    for name in set(tensors) - weights - scales:
        assert tensors[name].dtype == torch.float32 and tensors[name].shape == (4,)


def test_weights_and_scales_lie_apart_and_mtp_extras_come_last(made):
    index = json.loads((made / "fp8" / "model.safetensors.index.json").read_text())
    where, files = index["weight_map"], sorted({*index["weight_map"].values()})
    assert files == [f"model-0000{i}-of-000004.safetensors" for i in range(1, 5)]
    apart = [name for name in where if f"{name}_scale_inv" in where and where[name] != where[f"{name}_scale_inv"]]
    # Every cut but the last, which the extras decide.
    assert len(apart) >= len(files) - 2
    assert {where[f"{name}_scale_inv"] for name in apart} >= set(files[1:-1])
    extras = [n for n in where if re.match(r"model\.layers\.2\.(embed_tokens|enorm|hnorm|eh_proj|shared_head)", n)]
    assert len(extras) == 6 and {where[name] for name in extras} == {files[-1]}
    assert any(file != files[-1] for name, file in where.items() if name.startswith("model.layers.2."))
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size() for tensor in read_all(made / "fp8").values()
    )
    for file in files:
        with safe_open(made / "fp8" / file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name in where if where[name] == file}


@pytest.mark.parametrize("quantized", [True, False])
def test_where_the_head_is_the_embedding_so_is_its_copy(quantized, tmp_path):
    write_checkpoint({**CONFIG, "tie_word_embeddings": True}, tmp_path / "x", quantized=quantized)
    tensors = read_all(tmp_path / "x")
    assert "lm_head.weight" not in tensors and inspect(tmp_path / "x").sound
    for name in ("embed_tokens", "shared_head.head"):
        assert torch.equal(tensors[f"model.layers.2.{name}.weight"], tensors["model.embed_tokens.weight"])


def test_mtp_modules_hold_the_main_embedding_and_head_again(made):
    tensors = read_all(made / "bf16")
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("shards", range(3, 10))
def test_every_file_but_first_and_last_begins_with_a_scale_whose_weight_is_elsewhere(tmp_path, shards):
    write_checkpoint(CONFIG, tmp_path / "x", shards=shards, sparse=True)
    where = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())["weight_map"]
    apart = {
        where[f"{name}_scale_inv"]
        for name in where
        if f"{name}_scale_inv" in where and where[name] != where[f"{name}_scale_inv"]
    }
    assert apart >= set(sorted({*where.values()})[1:-1])


def test_config_says_what_is_there(made):
    fp8, ue8m0 = (json.loads((made / name / "config.json").read_text()) for name in ("fp8", "ue8m0"))
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert fp8["quantization_config"] == quantization
    assert ue8m0["quantization_config"] == {**quantization, "scale_fmt": "ue8m0"}


def test_values_are_realistic(made):
    tensors = read_all(made / "fp8")
    for name, tensor in tensors.items():
        values = tensor.float()
        assert values.isfinite().all() and values.std() > 0, name
        if name.endswith("_scale_inv"):
            codes = tensors[name.removesuffix("_scale_inv")].float()
            assert (tensor > 0).all() and codes.abs().max() == 448
            assert 0.005 < (codes[:128, :128] * tensor[0, 0]).std() < 0.1
    mantissas = torch.cat([t.flatten() for n, t in tensors.items() if n.endswith("_scale_inv")]).frexp()[0]
    assert (mantissas != 0.5).all()
    powers = [t for n, t in read_all(made / "ue8m0").items() if n.endswith("_scale_inv")]
    assert all((scale.frexp()[0] == 0.5).all() for scale in powers)


def test_the_seed_decides(made, tmp_path):
    write_checkpoint(CONFIG, tmp_path / "same", shards=4, seed=1)
    assert snapshot(tmp_path / "same") == snapshot(made / "fp8")
    write_checkpoint(CONFIG, tmp_path / "one", shards=1, seed=1)
    one, four = read_all(tmp_path / "one"), read_all(made / "fp8")
    assert one.keys() == four.keys()
    assert all(torch.equal(one[name].view(torch.uint8), four[name].view(torch.uint8)) for name in one)
    write_checkpoint(CONFIG, tmp_path / "other", shards=4, seed=2)
    assert snapshot(tmp_path / "other") != snapshot(made / "fp8")


def test_true_sizes_by_headers_alone(published):
    """DeepSeek-V3 itself: the counts of the published 163 files."""
    checkpoint = open_checkpoint(published)
    assert (len(checkpoint.files), len(checkpoint.tensors)) == (163, 91_991)
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == 688_574_839_360
    found = inspect(published)
    assert found.sound and found.preset == "deepseek-v3" and found.scale_fmt is None
    assert found.dtypes["F8_E4M3"] == {"tensors": 45_808, "bytes": 680_571_043_840}
    assert found.dtypes["F32"] == {"tensors": 45_808 + 59, "bytes": 4 * (41_540_496 + 59 * 256)}
    assert found.dtypes["BF16"]["bytes"] == 2 * 3_918_786_560
    assert found.parameters["total"] == {"found": 684_489_845_504, "expected": 684_489_845_504}
    main = found.parameters["total"]["found"] - found.parameters["mtp"]["found"]
    assert main == 671_026_419_200
    assert checkpoint["model.layers.61.eh_proj.weight"].file.endswith("model-00163-of-000163.safetensors")


def test_a_choice_of_layers_is_renumbered(tmp_path):
    raw = {**PRESETS["deepseek-v3"], "n_routed_experts": 2, "vocab_size": 64}
    write_checkpoint(raw, tmp_path / "two", layers=(0, 5, 61), sparse=True)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    sizes = ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers")
    assert [config[key] for key in sizes] == [2, 1, 1]
    found = inspect(tmp_path / "two")
    assert found.sound and found.mtp_found == 1
    assert found.parameters["dense_mlp"]["found"] == 396_361_728
    for layers in [(61,), (62,), (-1, 3), ()]:
        with pytest.raises(CheckpointError, match="layer"):
            write_checkpoint(raw, tmp_path / "none", layers=layers)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shards", [0, -1, 10_000])
def test_bad_arguments(tmp_path, shards):
    with pytest.raises(CheckpointError, match="files"):
        write_checkpoint(CONFIG, tmp_path / "x", shards=shards)
    with pytest.raises(CheckpointError, match="scale format"):
        write_checkpoint(CONFIG, tmp_path / "x", scale_fmt="e5m2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        write_checkpoint(CONFIG, tmp_path / "full")


def test_configuration_objects_are_taken_as_well(tmp_path):
    from deepseek_v3.configuration import preset

    write_checkpoint(preset("tiny"), tmp_path / "tiny")
    found = inspect(tmp_path / "tiny")
    assert found.sound and found.preset == "tiny"
