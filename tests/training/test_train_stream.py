"""Streams against the same texts packed at once, resumed at every block."""

import itertools
import json
from collections import Counter

import pytest
from datasets import Dataset

from deepseek_v3.training.data import pack, text_files, train_tokenizer
from deepseek_v3.training.stream import PackedStream, StepStream, is_held_out, saved_place, stream_texts

TEXTS = [f"text {i}: " + "some words of it, " * (i % 7) + "日本" * (i % 3) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module", params=["jsonl", "parquet", "txt"])
def files(request, tmp_path_factory):
    """The texts in 4 files, or in 60."""
    folder = tmp_path_factory.mktemp(request.param)
    for part in range(4):
        rows = TEXTS[15 * part : 15 * part + 15]
        if request.param == "jsonl":
            lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in rows)
            (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        elif request.param == "parquet":
            Dataset.from_dict({"text": rows}).to_parquet(folder / f"{part}.parquet")
        else:
            for i, text in enumerate(rows):
                (folder / f"{15 * part + i:02d}.txt").write_text(text, encoding="utf-8")
    return text_files([folder])


def first(stream, blocks):
    return list(itertools.islice(stream, blocks))


@pytest.mark.parametrize("mask", [False, True])
def test_unshuffled_blocks_are_those_of_pack(files, mask, tokenizer):
    """Three passes, since a stream joins one to the next."""
    expected = list(pack(TEXTS * 3, tokenizer, 32, mask))
    got = first(PackedStream(files, tokenizer, 32, mask, shuffle_buffer=0), len(expected))
    assert got == expected
    assert ("position_ids" in got[0]) is mask


@pytest.mark.parametrize("buffer", [0, 7, 1000])
def test_a_place_goes_on_exactly(files, buffer, tokenizer):
    def make():
        return PackedStream(files, tokenizer, 24, True, shuffle_buffer=buffer, seed=5, held_out=0.2)

    whole = make()
    blocks, places = [], []
    for count, block in enumerate(itertools.islice(whole, 120), 1):
        blocks.append(block)
        places.append(json.loads(json.dumps(whole.place_at(count))))  # as in trainer_state.json
    assert places[-1]["pass"] >= 1  # beyond the end of the data
    for count in (1, 2, 17, 59, 119):
        resumed = make()
        resumed.start = places[count - 1]
        assert first(resumed, 120 - count) == blocks[count:], count


def test_a_place_is_as_good_after_going_on_from_another(files, tokenizer):
    def make():
        return PackedStream(files, tokenizer, 24, True, shuffle_buffer=3, seed=5)

    expected, got, stream = first(make(), 120), [], make()
    for count in range(10, 130, 10):
        got += first(stream, 10)
        place = stream.place_at(count)
        stream = make()
        stream.start = place
    assert got == expected


def test_a_place_is_kept_for_blocks_that_are_read_ahead(files, tokenizer):
    stream = PackedStream(files, tokenizer, 24)
    blocks = first(stream, 9)
    stream.start = stream.place_at(6)
    assert first(stream, 3) == blocks[6:]
    with pytest.raises(KeyError):
        stream.place_at(5)  # forgotten


def texts_of(stream, tokenizer, count):
    """The first texts of a stream, from its tokens."""
    tokens = itertools.chain.from_iterable(block["input_ids"] for block in stream)
    text, found = [], []
    while len(found) < count:
        token = next(tokens)
        if token == tokenizer.eos_token_id:
            found.append(tokenizer.decode(text))
            text = []
        elif token != tokenizer.bos_token_id:
            text.append(token)
    return found


def test_each_pass_shuffles_all_texts_anew(files, tokenizer):
    stream = PackedStream(files, tokenizer, 16, shuffle_buffer=20, seed=1)
    both = texts_of(stream, tokenizer, 120)
    one, two = both[:60], both[60:]
    assert Counter(one) == Counter(two) == Counter(TEXTS)
    assert one != two and one != TEXTS
    again = texts_of(PackedStream(files, tokenizer, 16, shuffle_buffer=20, seed=1), tokenizer, 60)
    other = texts_of(PackedStream(files, tokenizer, 16, shuffle_buffer=20, seed=2), tokenizer, 60)
    assert again == one != other


def test_held_out_texts_are_in_no_block(files, tokenizer):
    kept = list(stream_texts(files, 0.2, evaluated=True))
    trained = list(stream_texts(files, 0.2, evaluated=False))
    assert 4 < len(kept) < 20
    assert sorted(kept + trained) == sorted(TEXTS)
    assert all(is_held_out(text, 0.2) for text in kept)
    seen = texts_of(PackedStream(files, tokenizer, 16, held_out=0.2), tokenizer, len(trained))
    assert sorted(seen) == sorted(trained)


def test_what_is_not_text_is_passed_over_or_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" ")
    assert list(stream_texts(text_files([tmp_path]), 0.0, evaluated=False)) == ["good"]
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}')
    assert list(stream_texts(text_files([tmp_path]), 0.0, evaluated=False)) == ["good", "one", "two"]
    (tmp_path / "other.jsonl").write_text('{"content": "one"}')
    with pytest.raises(ValueError, match=r"other.jsonl has the columns 'content', and needed is 'text'"):
        first(PackedStream([tmp_path / "other.jsonl"], tokenizer, 4), 1)
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}')
    with pytest.raises(ValueError, match="numbers.jsonl: a row's 'text' is a int: 3"):
        first(PackedStream([tmp_path / "numbers.jsonl"], tokenizer, 4), 1)
    with pytest.raises(ValueError, match="no text to train on"):
        first(PackedStream([tmp_path / "empty.txt", tmp_path / "latin.txt"], tokenizer, 4), 1)
    stream = PackedStream([tmp_path / "a.txt"], tokenizer, 4)
    stream.start = {**stream.start, "blocks": 5}
    with pytest.raises(ValueError, match="after 5 blocks, where no step of this batch ramp ends"):
        first(StepStream(stream, [2, 4, 6]), 1)
    with pytest.raises(ValueError, match="checkpoint-3 is of a run without --stream"):
        saved_place({}, "checkpoint-3")
