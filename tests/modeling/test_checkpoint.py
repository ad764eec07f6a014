"""Saving and loading: official names, bit-identical logits, other layouts, and what is missing or wrong."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as NativeForCausalLM

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from deepseek_v3.configuration import official_tensors, preset
from twins import make_model


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(one, two, tokens):
    with torch.no_grad():
        before, after = (m.eval()(tokens, output_mtp_logits=True) for m in (one, two))
    assert torch.equal(before.logits, after.logits)
    assert len(before.mtp_logits) == len(after.mtp_logits)
    assert all(torch.equal(a, b) for a, b in zip(before.mtp_logits, after.mtp_logits, strict=True))


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("shard_size", ["50GB", "200KB"])
def test_saved_folder_has_exactly_the_official_tensors_and_gives_the_model_back(depths, shard_size, tmp_path, tokens):
    model = make_model(num_nextn_predict_layers=depths)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    tensors = stored(tmp_path)
    expected = {spec.name: spec.shape for spec in official_tensors(model.config)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    for depth in range(depths):
        prefix = f"model.layers.{3 + depth}"
        assert torch.equal(tensors[f"{prefix}.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
        assert torch.equal(tensors[f"{prefix}.shared_head.head.weight"], tensors["lm_head.weight"])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, DeepseekV3ForCausalLM)
    assert not any(info.values())
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if depths:
        assert_same(model, loaded, tokens)


def test_experts_are_split_as_the_official_files_have_them(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    for expert in range(8):
        fused = model.model.layers[1].mlp.experts.gate_up_proj[expert]
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(tensors[f"{prefix}.gate_proj.weight"], fused[:32])
        assert torch.equal(tensors[f"{prefix}.up_proj.weight"], fused[32:])


def test_native_class_loads_what_we_save_and_we_load_what_it_saves(tmp_path, tokens, caplog):
    model = make_model()
    model.save_pretrained(tmp_path / "ours")
    native = NativeForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(native(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    native.save_pretrained(tmp_path / "native")
    with caplog.at_level(logging.WARNING):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    assert sum("no MTP weights" in record.getMessage() for record in caplog.records) == 1
    assert loaded.config.num_nextn_predict_layers == 0
    assert len(loaded.model.layers) == 3
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(".layers.3." in name for name in stored(tmp_path / "again"))


def test_fused_layout_is_read_and_the_official_one_written(tmp_path, tokens):
    model = make_model()
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in stored(tmp_path / "fused")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert_same(model, loaded, tokens)
    loaded.save_pretrained(tmp_path / "official")
    assert stored(tmp_path / "official").keys() == {spec.name for spec in official_tensors(model.config)}


@pytest.mark.parametrize("shards", [1, 5])
def test_load_state_dict_takes_official_names_whole_and_in_shards(shards, tokens):
    model, other = make_model(seed=0), make_model(seed=1)
    official = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            official[name] = tensor
            continue
        prefix = name.rsplit(".", 1)[0]
        for expert in range(8):
            if name.endswith("down_proj"):
                official[f"{prefix}.{expert}.down_proj.weight"] = tensor[expert]
            else:
                gate, up = tensor[expert].chunk(2)
                official[f"{prefix}.{expert}.gate_proj.weight"] = gate
                official[f"{prefix}.{expert}.up_proj.weight"] = up
    names = sorted(official)
    for shard in range(shards):
        result = other.load_state_dict({name: official[name] for name in names[shard::shards]}, strict=shards == 1)
        assert not result.unexpected_keys
    assert_same(model, other, tokens)


def test_load_state_dict_says_what_it_did_not_find_and_what_does_not_fit():
    model = make_model()
    prefix = "model.layers.1.mlp.experts"
    result = model.load_state_dict({f"{prefix}.0.gate_proj.weight": torch.ones(32, 64)}, strict=False)
    assert f"{prefix}.0.up_proj.weight" in result.missing_keys
    assert f"{prefix}.0.gate_proj.weight" not in result.missing_keys
    assert (model.model.layers[1].mlp.experts.gate_up_proj[0, :32] == 1).all()
    with pytest.raises(RuntimeError, match=r"experts\.0\.up_proj\.weight: \(31, 64\)"):
        model.load_state_dict({f"{prefix}.0.up_proj.weight": torch.ones(31, 64)}, strict=False)
    result = model.load_state_dict({f"{prefix}.8.up_proj.weight": torch.ones(32, 64)}, strict=False)
    assert result.unexpected_keys == [f"{prefix}.8.up_proj.weight"]


def test_tied_embeddings_are_stored_once_and_copied_for_mtp(tmp_path, tokens):
    model = make_model(tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["model.embed_tokens.weight"])
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path), tokens)


def test_fewer_mtp_modules_can_be_asked_for(tmp_path, tokens):
    model = make_model(num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=1, output_loading_info=True)
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model(tokens, output_mtp_logits=True).mtp_logits[0]
        assert torch.equal(loaded.eval()(tokens, output_mtp_logits=True).mtp_logits[0], expected)


@pytest.mark.parametrize("device_map", ["auto", "disk"])
def test_offloaded_models_compute_and_save_the_same(device_map, tmp_path, tokens):
    model = make_model()
    model.save_pretrained(tmp_path / "a")
    if device_map == "disk":
        device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        device_map |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map=device_map, offload_folder=tmp_path / "o")
    assert_same(model, loaded, tokens)
    generated = loaded.generate(tokens[:, :8], max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, model.generate(tokens[:, :8], max_new_tokens=6, do_sample=False))
    loaded.save_pretrained(tmp_path / "b")
    saved, expected = stored(tmp_path / "b"), stored(tmp_path / "a")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_base_and_classification_models_load_a_causal_lm_folder(tmp_path, tokens):
    model = make_model(pad_token_id=2)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    classifier, info = DeepseekV3ForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert classifier.config.num_nextn_predict_layers == 0
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        assert torch.equal(base(tokens).last_hidden_state, hidden)
        assert torch.equal(classifier.eval().model(tokens).last_hidden_state, hidden)
    classifier.save_pretrained(tmp_path / "classifier")
    again = DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, classifier(tokens).logits)


def sharded(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(name, tmp_path):
    index, content = sharded(tmp_path)
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a plain file name"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    index, content = sharded(tmp_path)
    shard = content["weight_map"]["model.norm.weight"]
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=shard):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}'])
def test_an_index_that_is_none_is_refused(content, tmp_path):
    index, _ = sharded(tmp_path)
    index.write_text(content)
    with pytest.raises(ValueError, match="index.json: (no valid JSON|a JSON object|has no weight_map)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_corrupt_config_and_a_truncated_file_are_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="model.safetensors: the data is cut short"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(OSError, match="valid JSON"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_kimi_k2_folders_keep_their_model_type(tmp_path, tokens):
    config = preset(
        "kimi-k2", **{k: v for k, v in preset("tiny").to_dict().items() if k not in ("model_type", "dtype")}
    )
    model = DeepseekV3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kimi_k2"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.config).__name__ == "KimiK2Config"
    assert_same(model, loaded, tokens)


def test_a_wrong_shape_is_reported(tmp_path):
    make_model().save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight: shape \[3\], config.json asks for"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_within_inference_mode(tmp_path, tokens):
    model = make_model()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded, tokens)


def test_a_folder_that_names_these_classes_as_its_own_code_can_be_saved_again(tmp_path, tokens):
    model = make_model()
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "ours.DeepseekV3Config", "AutoModelForCausalLM": "ours.DeepseekV3ForCausalLM"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "ours.py").write_text("from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert_same(model, loaded, tokens)
    loaded.save_pretrained(tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.py"))
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "b"), tokens)


@pytest.mark.parametrize("options", [{}, {"quantize": "fp8"}], ids=["plain", "fp8"])
def test_a_saved_folder_names_no_code_that_it_does_not_hold(options, tmp_path):
    """The published config.json names files that lie beside it; tools that trust remote code would look for them."""
    model = make_model()
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    remote = {"AutoModel": "someone/somewhere--modeling_deepseek.DeepseekV3Model"}
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", **remote}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b", **options)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["auto_map"] == remote
    del config["auto_map"]["AutoModel"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c", **options)
    assert "auto_map" not in json.loads((tmp_path / "c" / "config.json").read_text())
