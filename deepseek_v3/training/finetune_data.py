"""Conversations, prompts with completions, and texts from files, as token ids with labels, packed or padded.

Special about it: what is learnt of a conversation is what the assistant says. A chat template that marks it
({% generation %}) says where that is; with any other the conversation is encoded turn by turn, and a template that
rewrites earlier turns is refused instead of masked wrongly. Packed documents keep position_ids of their own, by which
attention and MTP tell them apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from ..modeling_deepseek_v3.losses import IGNORE_INDEX

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
Encoded = dict[str, list[int]]


def load_files(files: Sequence[str | Path], stream: bool = False) -> Any:
    """The rows of JSON, JSONL, Parquet or text files (a document each), through `datasets`.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: files of an unknown kind, of several kinds, or that hold no rows; JSON that cannot be read.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give JSON, JSONL, Parquet or text files")
    kinds = {_LOADERS.get(path.suffix) for path in paths}
    if None in kinds or len(kinds) != 1:
        names = ", ".join(sorted({path.suffix or path.name for path in paths}))
        raise ValueError(f"--data holds {names}: give files of one kind, among {', '.join(_LOADERS)}")
    kind = str(kinds.pop())
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        rows = datasets.load_dataset(
            kind, data_files=[str(p) for p in paths], split="train", streaming=stream, **options
        )
        first = next(iter(rows), None)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"{', '.join(map(str, paths))} cannot be read as {kind}: {error.__cause__ or error}"
        ) from error
    if first is None:
        raise ValueError(f"{', '.join(map(str, paths))} hold no rows")
    return rows


def encoder(columns: Sequence[str], tokenizer: Any) -> Callable[[dict[str, Any]], Encoded]:
    """What turns a row into `input_ids` and `labels`: by its messages, its prompt and completion, or its text.

    Raises:
        ValueError: columns that are none of these; messages without a chat template.
    """
    if "messages" in columns:
        if not tokenizer.chat_template:
            raise ValueError(
                "the data has a column 'messages' and the tokenizer no chat template. Set tokenizer.chat_template and "
                "save it with the model, or give the columns 'prompt' and 'completion'"
            )
        return lambda row: encode_chat(row["messages"], tokenizer)
    if "prompt" in columns and "completion" in columns:
        return lambda row: encode_pair(row["prompt"], row["completion"], tokenizer)
    if "text" in columns:
        return lambda row: _whole([*_bos(tokenizer), *_ids(tokenizer, row["text"]), tokenizer.eos_token_id])
    raise ValueError(
        f"the data has the columns {', '.join(map(repr, columns))}; needed is 'messages', or 'prompt' and "
        "'completion', or 'text'. Rename yours"
    )


def encode_chat(messages: list[dict[str, Any]], tokenizer: Any) -> Encoded:
    """A conversation through the tokenizer's chat template, the labels those of the assistant's words.

    Raises:
        ValueError: a template without generation markers that shows earlier turns otherwise once others follow.
    """
    if "generation %}" in tokenizer.chat_template or "generation -%}" in tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return _masked(encoded["input_ids"], encoded["assistant_masks"])
    text = _render(tokenizer, messages)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        through = _render(tokenizer, messages[: turn + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template shows turn {turn + 1} of a conversation otherwise once others follow, so that its "
                "words cannot be told apart. Put {% generation %} ... {% endgeneration %} around what the assistant "
                "says in the template"
            )
        spans.append((len(before), len(through)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    learnt = [any(begin < stop and end > start for start, stop in spans) for begin, end in offsets]
    return _masked(encoded["input_ids"], learnt)


def encode_pair(prompt: Any, completion: Any, tokenizer: Any) -> Encoded:
    """A prompt and what is learnt to follow it: texts, or lists of messages."""
    if isinstance(prompt, list):
        return encode_chat([*prompt, *completion], tokenizer)
    given = [*_bos(tokenizer), *_ids(tokenizer, prompt)]
    answer = [*_ids(tokenizer, completion), tokenizer.eos_token_id]
    return _masked(given + answer, [0] * len(given) + [1] * len(answer))


def _render(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)) if messages else ""


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _whole(ids: list[int]) -> Encoded:
    return _masked(ids, [1] * len(ids))


def _masked(ids: Sequence[int], learnt: Sequence[int]) -> Encoded:
    labels = [token if learn else IGNORE_INDEX for token, learn in zip(ids, learnt, strict=True)]
    return {"input_ids": list(ids), "labels": labels}


def pack(batch: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Documents joined into rows of at most `length` tokens, none of them split, longest first.

    Args:
        batch: `input_ids` and `labels`, each document at most `length` long.
        length: tokens in a row.

    Returns:
        `input_ids`, `labels` and `position_ids`, which start from 0 at each document; the label of a document's first
        token is -100, since the token before it belongs to another.
    """
    documents = sorted(zip(batch["input_ids"], batch["labels"], strict=True), key=lambda pair: -len(pair[0]))
    rows: list[Encoded] = []
    for ids, labels in documents:
        row = next((row for row in rows if len(row["input_ids"]) + len(ids) <= length), None)
        if row is None:
            row = {"input_ids": [], "labels": [], "position_ids": []}
            rows.append(row)
        row["input_ids"] += ids
        row["labels"] += [IGNORE_INDEX, *labels[1:]]
        row["position_ids"] += range(len(ids))
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels", "position_ids")}


def prepare(rows: Any, tokenizer: Any, length: int, packing: bool = True) -> Any:
    """Rows of files as a dataset for `Trainer`: encoded, cut at `length` tokens, those without a label left out.

    Raises:
        ValueError: as of `encoder`; nothing is left to learn.
    """
    columns = list(next(iter(rows)))
    encode = encoder(columns, tokenizer)

    def cut(row: dict[str, Any]) -> Encoded:
        return {name: ids[:length] for name, ids in encode(row).items()}

    fresh = {} if isinstance(rows, datasets.IterableDataset) else {"load_from_cache_file": False}
    encoded = rows.map(cut, remove_columns=columns, **fresh)
    learnt = encoded.filter(_is_learnt, **fresh)
    if next(iter(learnt.take(1) if fresh == {} else learnt), None) is None:
        raise ValueError(
            f"every label is masked: no row has a token to learn in its first {length}. Look for assistant turns in "
            "the messages, or raise --max-length"
        )
    if not packing:
        return learnt
    return learnt.map(lambda batch: pack(batch, length), batched=True, batch_size=1000, **fresh)


def _is_learnt(row: Encoded) -> bool:
    """Whether any token but the first, which nothing predicts, has a label."""
    return any(label != IGNORE_INDEX for label in row["labels"][1:])


@dataclass
class PaddingCollator:
    """Rows to a batch of tensors [B, T], padded on the right to the longest.

    Packed rows carry no mask, by which transformers recognises documents; their padding is a document of its own.

    Attributes:
        pad_token_id: what is written there.
    """

    pad_token_id: int

    def __call__(self, rows: list[Encoded]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        missing = [longest - len(row["input_ids"]) for row in rows]
        fills: dict[str, Callable[[int], list[int]]] = {
            "input_ids": lambda count: [self.pad_token_id] * count,
            "labels": lambda count: [IGNORE_INDEX] * count,
            "position_ids": lambda count: list(range(count)),
        }
        names = [name for name in fills if name in rows[0]]
        padded = {n: [r[n] + fills[n](m) for r, m in zip(rows, missing, strict=True)] for n in names}
        if "position_ids" not in names:
            padded["attention_mask"] = [[1] * (longest - m) + [0] * m for m in missing]
        return {name: torch.tensor(values) for name, values in padded.items()}
