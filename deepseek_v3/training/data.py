"""From text files to packed training blocks: reading, holding out, a byte-level BPE tokenizer, packing."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def text_files(sources: Sequence[str | Path], suffixes: Sequence[str] = (".txt", ".py", ".md")) -> list[Path]:
    """The files among `sources`, and those with one of `suffixes` below the folders among them, sorted.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: nothing was found.
    """
    found: set[Path] = set()
    for source in map(Path, sources):
        if source.is_file():
            found.add(source)
        elif source.is_dir():
            found.update(path for path in source.rglob("*") if path.suffix in suffixes and path.is_file())
        else:
            raise FileNotFoundError(f"{source} does not exist; give files or folders of text")
    if not found:
        raise ValueError(f"no file with a name in {', '.join(suffixes)} below {', '.join(map(str, sources))}")
    return sorted(found)


def read_texts(files: Iterable[Path], limit_bytes: int | None = None) -> Iterator[tuple[Path, str]]:
    """(file, text) of every file that is UTF-8 and not empty, until `limit_bytes` are read."""
    total = 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        if not text.strip():
            continue
        total += len(text.encode())
        if limit_bytes is not None and total > limit_bytes:
            return
        yield file, text


def split_texts(texts: Iterable[tuple[Path, str]], held_out: float) -> tuple[list[str], list[tuple[Path, str]]]:
    """Training texts and held-out (file, text) pairs, about `held_out` of the files, chosen by a hash of the name.

    Files of the same content are never on both sides.
    """
    train, kept, seen = [], [], set()
    for path, text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        draw = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "big") / 2**32
        if draw < held_out:
            kept.append((path, text))
        else:
            train.append(text)
    if not train or (held_out > 0 and not kept):
        raise ValueError(f"{len(train) + len(kept)} texts are too few to hold out {held_out:.0%} of them; add files")
    return train, kept


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` words: any text encodes, and decodes to itself."""
    if vocab_size < 256 + 3:
        raise ValueError(f"vocab_size = {vocab_size}: a byte-level vocabulary has 256 bytes and 3 special words")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def pack(texts: Iterable[str], tokenizer: Any, length: int, mask_documents: bool = False) -> datasets.Dataset:
    """Documents one after another, cut into blocks of `length` tokens.

    Args:
        texts: one document each; each starts with BOS and ends with EOS.
        tokenizer: any tokenizer with both.
        length: tokens in a block; what does not fill the last block is dropped.
        mask_documents: add position_ids that restart at each document, so that neither attention nor MTP looks
            across a border. Off, as in the report's pre-training.

    Returns:
        A dataset with `input_ids`, `labels` and, with `mask_documents`, `position_ids`.

    Raises:
        ValueError: the texts do not fill one block.
    """
    tokens: list[int] = []
    positions: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        document = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        tokens.extend(document)
        positions.extend(range(len(document)))
    blocks = len(tokens) // length
    if blocks == 0:
        raise ValueError(f"{len(tokens)} tokens do not fill one block of {length}; add text or lower the length")
    rows = _rows(tokens, blocks, length)
    columns = {"input_ids": rows, "labels": rows}
    if mask_documents:
        columns["position_ids"] = _rows(positions, blocks, length)
    return datasets.Dataset.from_dict(columns)


def _rows(values: list[int], blocks: int, length: int) -> list[list[int]]:
    return [values[start : start + length] for start in range(0, blocks * length, length)]
