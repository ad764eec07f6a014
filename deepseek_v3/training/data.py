"""From text files to packed training blocks: reading, holding out, a byte-level BPE tokenizer, packing."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .finetune_data import load_files

ROW_FILES = (".json", ".jsonl", ".parquet")
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def text_files(
    sources: Sequence[str | Path], suffixes: Sequence[str] = (".txt", ".py", ".md", ".jsonl", ".parquet")
) -> list[Path]:
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
    """(file, text) of every file that is UTF-8 and not empty, until `limit_bytes` are read.

    JSON, JSONL and Parquet files give each row's `text`, under the name FILE#ROW.
    """
    total = 0
    for file in files:
        for name, text in _texts_of(file):
            if not text.strip():
                continue
            total += len(text.encode())
            if limit_bytes is not None and total > limit_bytes:
                return
            yield name, text


def _texts_of(file: Path) -> Iterator[tuple[Path, str]]:
    if file.suffix in ROW_FILES:
        for index, row in enumerate(text_rows([file])):
            yield file.with_name(f"{file.name}#{index}"), text_of(row, file)
        return
    with contextlib.suppress(UnicodeDecodeError):  # not text
        yield file, file.read_text(encoding="utf-8")


def text_rows(files: Sequence[Path]) -> datasets.IterableDataset:
    """The rows of JSON, JSONL or Parquet files of one kind, read as they are used.

    Raises:
        ValueError: the rows have no column `text`.
    """
    rows: datasets.IterableDataset = load_files(files, stream=True)
    columns = list(next(iter(rows)))
    if "text" not in columns:
        raise ValueError(
            f"{files[0]} has the columns {', '.join(map(repr, columns))}, and needed is 'text'. Rename yours"
        )
    return rows


def text_of(row: dict[str, Any], file: Path) -> str:
    """The text of a row of `file`, empty where it has none.

    Raises:
        ValueError: it is something else than text.
    """
    text = row.get("text")
    if not isinstance(text, str | None):
        raise ValueError(f"{file}: a row's 'text' is a {type(text).__name__}: {str(text)[:100]}. Write text there")
    return text or ""


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
        if draw(path.name) < held_out:
            kept.append((path, text))
        else:
            train.append(text)
    if not train or (held_out > 0 and not kept):
        raise ValueError(f"{len(train) + len(kept)} texts are too few to hold out {held_out:.0%} of them; add files")
    return train, kept


def draw(name: str) -> float:
    """A number from 0 to below 1 that depends on nothing but `name`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def head(texts: Iterable[str], size: int) -> list[str]:
    """The first texts until they have `size` bytes; the last of them is cut."""
    kept: list[str] = []
    for text in texts:
        data = text.encode()
        kept.append(data[:size].decode(errors="ignore"))
        size -= len(data)
        if size <= 0:
            break
    return kept


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
