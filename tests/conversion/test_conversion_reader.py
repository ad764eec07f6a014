"""Folders: what belongs to a checkpoint, and indices that point where they should not."""

import json
import os
import shutil

import pytest
import torch
from checkpoint_files import CONFIG, write_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_v3.conversion import CheckpointError, open_checkpoint
from deepseek_v3.conversion.reader import INDEX_NAME

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def edit_index(folder, change):
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def refused(folder, *words, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "layout", "files"),
    [("fp8", "official", 4), ("bf16", "official", 4), ("fused", "fused", 1), ("inference", "inference", 2)],
)
def test_every_layout_is_recognised(made, name, layout, files):
    checkpoint = open_checkpoint(made / name)
    assert (checkpoint.layout, len(checkpoint.files)) == (layout, files)
    assert checkpoint.config["hidden_size"] == CONFIG["hidden_size"]
    assert checkpoint.nbytes == sum(path.stat().st_size for path in (made / name).glob("*.safetensors"))


def test_a_single_file_needs_no_index(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a": ("BF16", (2,), bytes(4))})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint["a"].shape == (2,) and checkpoint.config == {}
    with pytest.raises(CheckpointError, match="tensor b"):
        checkpoint["b"]


@pytest.mark.parametrize(
    "target", ["../../etc/passwd", "/etc/passwd", "..", "", ".", "a/b.safetensors", "a\\b", "a\0b"]
)
def test_index_that_points_elsewhere(copy, target):
    folder = copy("bf16")
    edit_index(folder, lambda m: m.update({"model.norm.weight": target}))
    refused(folder, INDEX_NAME, "plain file name")


def test_index_that_points_to_a_missing_file(copy):
    folder = copy("bf16")
    edit_index(folder, lambda m: m.update({"model.norm.weight": "model-9.safetensors"}))
    refused(folder, "model-9.safetensors", "does not exist")


def test_dangling_link(copy):
    folder = copy("bf16")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to("nowhere.safetensors")
    refused(folder, shard.name, "link to nothing")


def test_link_out_of_the_folder(copy, tmp_path):
    folder = copy("bf16")
    shard = sorted(folder.glob("*.safetensors"))[1]
    outside = tmp_path / "outside.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)
    refused(folder, shard.name, "link out of the folder")


def test_link_inside_the_folder_is_fine(copy):
    folder = copy("bf16")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(folder / "stored.safetensors")
    shard.symlink_to("stored.safetensors")
    assert len(open_checkpoint(folder).files) == 4


def test_hub_cache_snapshots_are_links_into_their_own_blobs(made, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((made / "bf16").iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", f"{number:064x}"))
    assert len(open_checkpoint(snapshot).files) == 4
    # Two folders up from anywhere else is simply out of the folder.
    snapshot.parent.rename(repository / "elsewhere")
    refused(repository / "elsewhere" / "abc", "link out of the folder")
    (repository / "elsewhere").rename(snapshot.parent)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shard = sorted(snapshot.glob("*.safetensors"))[0]
    shutil.copy(shard.resolve(), other / "blob")
    shard.unlink()
    shard.symlink_to(other / "blob")
    refused(snapshot, shard.name, "link out of the folder")


def test_tensor_that_is_not_in_its_file(copy):
    folder = copy("bf16")
    files = sorted(path.name for path in folder.glob("*.safetensors"))

    def move(weight_map):
        weight_map["lm_head.weight"] = next(name for name in files if name != weight_map["lm_head.weight"])

    edit_index(folder, move)
    refused(folder, "lm_head.weight", "does not hold it")


def test_tensor_that_the_index_forgets(copy):
    folder = copy("bf16")
    edit_index(folder, lambda m: m.pop("model.norm.weight"))
    refused(folder, "model.norm.weight", "missing from")


def test_tensor_in_two_files(tmp_path):
    for name in ("a", "b"):
        write_raw(
            tmp_path / f"{name}.safetensors", {f"only.{name}": ("BF16", (1,), b"ab"), "x": ("BF16", (1,), b"ab")}
        )
    weight_map = {"only.a": "a.safetensors", "only.b": "b.safetensors", "x": "a.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "tensor x", "a.safetensors", "b.safetensors")


@pytest.mark.parametrize(
    "text", ['{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{}", "[]", "", '{"a":1,"a":2}']
)
def test_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    refused(tmp_path, INDEX_NAME)


def test_pickles_are_refused_with_the_remedy(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "pickle", "save_pretrained")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    refused(tmp_path, "pytorch_model.bin", "pickle", "save_pretrained")


def test_shards_without_an_index_and_two_truths(copy, tmp_path):
    folder = copy("bf16")
    write_raw(folder / "model.safetensors", {"a": ("BF16", (1,), b"ab")})
    refused(folder, "both")
    (folder / "model.safetensors").unlink()
    (folder / INDEX_NAME).unlink()
    refused(folder, INDEX_NAME)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no safetensors")
    refused(tmp_path / "nothing", "does not exist")
    refused(folder / "config.json", "is no folder")


def test_ranks_must_be_complete_and_of_one_size(copy):
    folder = copy("inference")
    first, second = folder / "model0-mp2.safetensors", folder / "model1-mp2.safetensors"
    moved = folder.parent / "moved.safetensors"
    second.rename(moved)
    refused(folder, "1 of 2", second.name)
    shutil.copy(first, folder / "model0-mp1.safetensors")
    refused(folder, "different model-parallel sizes")
    (folder / "model0-mp1.safetensors").unlink()
    shutil.copy(first, folder / "model01-mp2.safetensors")
    refused(folder, "leading zeros")


def test_from_inference_insists_on_rank_files(made, copy):
    refused(made / "bf16", "no model{i}-mp{N}", layout="inference")
    folder = copy("inference")
    write_raw(folder / "model.safetensors", {"a": ("BF16", (1,), b"ab")})
    assert open_checkpoint(folder).layout == "official"
    assert open_checkpoint(folder, "inference").layout == "inference"


@FEW
@given(name=st.text(max_size=30))
def test_no_name_in_an_index_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    # Nothing but the index is there, so every name must be refused, and no path outside may be looked at.
    refused(tmp_path)


@FEW
@given(
    junk=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_as_an_index_is_refused(tmp_path, junk):
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": junk}))
    refused(tmp_path)
