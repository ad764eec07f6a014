"""safetensors headers: agreement with the safetensors library, and files that lie."""

import json
import os
import pickle
import struct

import pytest
import torch
from checkpoint_files import edit_header, write_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deepseek_v3.conversion import CheckpointError
from deepseek_v3.conversion.header import MAX_HEADER_BYTES, build_header, read_header

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@FEW
@given(entries=st.lists(st.tuples(st.sampled_from(sorted(TORCH)), SHAPES), max_size=6))
def test_reads_what_the_library_writes(tmp_path, entries):
    tensors = {f"t{i}": torch.zeros(shape, dtype=TORCH[dtype]) for i, (dtype, shape) in enumerate(entries)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert {n: (i.dtype, list(i.shape)) for n, i in header.tensors.items()} == {
        f"t{i}": (dtype, shape) for i, (dtype, shape) in enumerate(entries)
    }
    assert header.metadata == {"format": "pt"}


@FEW
@given(entries=st.lists(st.tuples(st.sampled_from(sorted(TORCH)), SHAPES), max_size=6))
def test_the_library_reads_what_is_built(tmp_path, entries):
    named = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(entries)]
    head, offsets, nbytes = build_header(named)
    data = os.urandom(nbytes - len(head))
    (tmp_path / "a.safetensors").write_bytes(head + data)
    assert len(head) % 8 == 0
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        for name, dtype, shape in named:
            tensor = file.get_tensor(name)
            assert tensor.dtype == TORCH[dtype] and tuple(tensor.shape) == shape
            begin = offsets[name] - len(head)
            raw = data[begin : begin + tensor.numel() * tensor.element_size()]
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw


@pytest.fixture
def valid(tmp_path):
    path = tmp_path / "a.safetensors"
    write_raw(path, {"one": ("F32", (2, 3), bytes(24)), "two": ("BF16", (4,), bytes(8))})
    return path


def refused(path, *words):
    """The one line with which the file is refused; it names the file and holds the words."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    assert all(word in message for word in words), message
    return message


def test_the_valid_file_is_read(valid):
    assert list(read_header(valid).tensors) == ["one", "two"]


@pytest.mark.parametrize("kept", [0, 3, 8, 20])
def test_cut_short(valid, kept):
    valid.write_bytes(valid.read_bytes()[:kept])
    refused(valid)


def test_data_cut_short(valid):
    valid.write_bytes(valid.read_bytes()[:-1])
    refused(valid, "cut short")


def test_bytes_after_the_data(valid):
    valid.write_bytes(valid.read_bytes() + b"x")
    refused(valid, "bytes of no tensor")


def test_header_longer_than_the_file(valid):
    valid.write_bytes(struct.pack("<Q", 10_000) + valid.read_bytes()[8:])
    refused(valid, "longer than the file")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_absurd_header_size_is_not_allocated(tmp_path, length):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        # A hole: the file really is as long as it says wherever the file system can hold that.
        file.truncate(min(length + 8, 1 << 38))
    refused(path, "header of", str(length))


def test_overlap(valid):
    edit_header(valid, lambda h: h["two"].update(data_offsets=[16, 24]))
    refused(valid, "two", "overlaps")


def test_gap(tmp_path):
    path = tmp_path / "gap.safetensors"
    text = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(3))
    refused(path, "tensor a", "gap")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]},
        {"dtype": "Q4", "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": ["F32"], "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3.0], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [True, 6], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [1 << 62] * 17, "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [False, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], "extra": 1},
        {"dtype": "F32", "shape": [2, 3]},
        "F32",
        None,
    ],
)
def test_bad_entries(valid, entry):
    edit_header(valid, lambda h: h.update(one=entry))
    refused(valid, "tensor one")


def test_the_same_name_twice(tmp_path):
    path = tmp_path / "twice.safetensors"
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"x":{entry},"x":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    refused(path, "tensor x", "twice")


@pytest.mark.parametrize(
    "text", [b"[]", b"{}}", b'{"a":NaN}', b"{\xff}", b'{"a":' * 50_000, b'{"__metadata__":{"a":1}}']
)
def test_headers_that_are_no_header(tmp_path, text):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused(path)


def test_a_pickle_is_named_as_one(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    refused(path, "pickle", "safetensors")


def test_a_plain_pickle_is_named_as_one_too(tmp_path):
    path = tmp_path / "model.safetensors"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"a": list(range(100))}, protocol))
        refused(path, "pickle", "safetensors")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """A pickle begins with 0x80 and its protocol, and so do these lengths; one file in two thousand has such a one."""
    path = tmp_path / "a.safetensors"
    for length in (0x0280, 0x0380, 0x0480, 0x0580, 0x10280):
        text = json.dumps({"t": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode().ljust(length)
        path.write_bytes(struct.pack("<Q", length) + text + b"abc")
        assert list(read_header(path).tensors) == ["t"]
        with safe_open(path, framework="pt") as file:
            assert file.get_tensor("t").tolist() == [97, 98, 99]


@pytest.mark.parametrize("kind", ["fifo", "folder", "missing"])
def test_what_is_no_file_does_not_hang(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    refused(path)


def test_control_characters_stay_out_of_messages(tmp_path):
    path = tmp_path / "n.safetensors"
    write_raw(path, {"a\n\x1b[31mb": ("F32", (3,), bytes(8))})
    assert "\\n" in refused(path) and "\x1b" not in refused(path)


@FEW
@given(data=st.data())
def test_random_damage_is_refused_or_harmless(tmp_path, data):
    """Whatever the bytes, the answer is a header that tiles the file or a CheckpointError; what we take, the
    safetensors library takes as well."""
    path = tmp_path / "fuzz.safetensors"
    write_raw(path, {"one": ("F32", (2, 3), bytes(24)), "two": ("BF16", (4,), bytes(8))})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        action = data.draw(st.sampled_from(["set", "drop", "add"]))
        if action == "set":
            raw[position] = data.draw(st.integers(0, 255))
        elif action == "drop" and len(raw) > 1:
            del raw[position]
        else:
            raw[position:position] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    assert sum(info.nbytes for info in header.tensors.values()) <= len(raw)
    try:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(header.tensors)
    except SafetensorError as error:
        # The library knows fewer dtypes, and asks nothing else of the file than we do.
        assert "variant" in str(error) or "dtype" in str(error), error
