"""Reading, tokenizing, packing, and the measurements, each against a plain computation."""

import lzma
import math

import pytest
import torch
from torch import nn

from deepseek_v3.training.data import pack, read_texts, split_texts, text_files, train_tokenizer
from deepseek_v3.training.evaluation import (
    bits_per_byte,
    expert_shares,
    max_violation,
    mtp_acceptance,
    xz_bits_per_byte,
)
from twins import make_model

TEXT = "def add(a, b):\n    return a + b  # 日本語 ünï\n" * 30


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 320)


def test_files_are_found_sorted_and_only_text_is_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.py").write_text("a")
    (tmp_path / "c.bin").write_text("c")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    files = text_files([tmp_path])
    assert [file.name for file in files] == ["b.txt", "empty.txt", "latin.txt", "a.py"]
    assert [text for _, text in read_texts(files)] == ["b", "a"]
    assert [text for _, text in read_texts(files, limit_bytes=1)] == ["b"]
    assert text_files([tmp_path / "c.bin"]) == [tmp_path / "c.bin"]


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        text_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no file with a name in"):
        text_files([tmp_path])


def test_held_out_files_are_stable_and_never_trained_on(tmp_path):
    texts = [(tmp_path / f"{i}.txt", f"text {i % 90}") for i in range(100)]
    train, held = split_texts(texts, 0.2)
    assert 5 < len(held) < 40
    assert len(train) + len(held) == 90  # the ten copies are dropped
    assert not set(train) & {text for _, text in held}
    assert split_texts(reversed(texts), 0.2)[1] != []
    with pytest.raises(ValueError, match="too few"):
        split_texts(texts[:1], 0.5)


def test_tokenizer_gives_any_text_back(tokenizer):
    for text in (TEXT, "\x00\x7f tabs\t€ 🙂", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="vocab_size = 100"):
        train_tokenizer([TEXT], 100)


def test_packing_keeps_every_token_in_order(tokenizer):
    texts = ["one two", "three", TEXT]
    data = pack(texts, tokenizer, 16, mask_documents=True)
    expected, positions = [], []
    for text in texts:
        document = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        expected += document
        positions += range(len(document))
    flat = [token for row in data["input_ids"] for token in row]
    assert flat == expected[: len(flat)]
    assert len(expected) - len(flat) < 16
    assert [p for row in data["position_ids"] for p in row] == positions[: len(flat)]
    assert "position_ids" not in pack(texts, tokenizer, 16).column_names
    with pytest.raises(ValueError, match="do not fill one block"):
        pack(["a"], tokenizer, 1000)


def test_bits_per_byte_counts_every_token_once(tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    texts = [TEXT[:60], TEXT[:400]]
    whole = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(ids).logits.double()
        whole += nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
    size = sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts, length=4096) == pytest.approx(whole / math.log(2) / size, rel=1e-5)
    # A model that knows nothing needs log2(V) bits a token, however the windows lie.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    for length in (8, 9, 64):
        measured = bits_per_byte(model, tokenizer, texts, length=length)
        assert measured == pytest.approx(tokens * math.log2(len(tokenizer)) / size, rel=1e-5)
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model, tokenizer, [])


def test_xz_is_xz():
    assert xz_bits_per_byte([TEXT, "b"]) == 8 * len(lzma.compress((TEXT + "b").encode(), preset=9)) / len(
        (TEXT + "b").encode()
    )


@pytest.mark.parametrize("depths", [1, 2])
def test_acceptance_is_agreement_with_the_main_model(depths):
    model = make_model(num_nextn_predict_layers=depths, vocab_size=12)
    blocks = torch.randint(0, 12, (5, 40)).tolist()
    accepted, tried = [0] * depths, [0] * depths
    for block in blocks:
        with torch.no_grad():
            output = model(torch.tensor([block]), output_mtp_logits=True)
        for i in range(40 - depths):
            for k in range(1, depths + 1):
                tried[k - 1] += 1
                if output.mtp_logits[k - 1][0, i].argmax() != output.logits[0, i + k].argmax():
                    break
                accepted[k - 1] += 1
    assert mtp_acceptance(model, blocks) == pytest.approx(
        [a / t if t else 0 for a, t in zip(accepted, tried, strict=True)]
    )
    with pytest.raises(ValueError, match="no block"):
        mtp_acceptance(model, [])


def test_expert_shares_with_and_without_the_bias(tokens):
    model = make_model()
    blocks = tokens.tolist()
    with torch.no_grad():
        bias = model.model.routers()[1].e_score_correction_bias
        bias[5] = 50.0
    with_bias, without = expert_shares(model, blocks), expert_shares(model, blocks, biased=False)
    assert with_bias[0][5] == pytest.approx(0.5)  # one of the two slots of every token
    assert without[0][5] < 0.4
    assert bias[5] == 50.0
    assert len(with_bias) == 2  # the main model's MoE layers
    assert max_violation([[0.5, 0.25, 0.25, 0.0], [0.25] * 4]) == pytest.approx(0.5)
