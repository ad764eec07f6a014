"""Conversations, prompts with completions, and texts from files, as token ids with labels, packed or padded.

Special about it: what is learnt of a conversation is what the assistant says. A chat template that marks it
({% generation %}) says where that is; with any other the conversation is encoded turn by turn, and a template that
rewrites earlier turns is refused instead of masked wrongly. Packed documents keep position_ids of their own, by which
attention and MTP tell them apart.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from ..modeling_deepseek_v3.losses import IGNORE_INDEX

LONG = ("cut", "split")
_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_ROW = {name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels")}
_PACKED = {**_ROW, "position_ids": _ROW["labels"]}
Encoded = dict[str, list[int]]


def load_files(files: Sequence[str | Path], stream: bool = False, option: str = "--data") -> Any:
    """The rows of JSON, JSONL, Parquet or text files (a document each), through `datasets`.

    Args:
        files: their paths.
        stream: read them as they are used.
        option: what errors call them.

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
        raise ValueError(f"{option} holds {names}: give files of one kind, among {', '.join(_LOADERS)}")
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
        return lambda row: encode_chat(_given(row, "messages"), tokenizer)
    if "prompt" in columns and "completion" in columns:
        return lambda row: encode_pair(_given(row, "prompt"), _given(row, "completion"), tokenizer)
    if "text" in columns:
        return lambda row: _whole([*_bos(tokenizer), *_ids(tokenizer, _given(row, "text")), tokenizer.eos_token_id])
    raise ValueError(
        f"the data has the columns {', '.join(map(repr, columns))}; needed is 'messages', or 'prompt' and "
        "'completion', or 'text'. Rename yours"
    )


def _given(row: dict[str, Any], column: str) -> Any:
    """A row's value of a column that other rows have.

    Raises:
        ValueError: it has none.
    """
    if row.get(column) is None:
        raise ValueError(f"a row has no {column!r}, as others have: {str(row)[:200]}. Complete it or leave it out")
    return row[column]


def encode_chat(messages: list[dict[str, Any]], tokenizer: Any) -> Encoded:
    """A conversation through the tokenizer's chat template, the labels those of the assistant's words.

    Raises:
        ValueError: messages without role or content; a template without generation markers that shows earlier turns
            otherwise once others follow.
    """
    for message in messages:
        if not isinstance(message, dict) or message.get("role") is None or "content" not in message:
            raise ValueError(f"a message has no 'role' or no 'content': {str(message)[:200]}")
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


def fit(document: Encoded, length: int, long_documents: str = "cut") -> list[Encoded]:
    """A document as pieces of at most `length` tokens.

    Cut, what follows is lost. Split, a piece begins with the last token of the one before it, so that every token but
    the document's first is predicted in one piece, from what that piece holds.

    Args:
        document: `input_ids` and `labels`.
        length: at least 2.
        long_documents: "cut" or "split".
    """
    total = len(document["input_ids"])
    starts = range(0, max(1, total - 1), length - 1) if long_documents == "split" else [0]
    return [{name: ids[start : start + length] for name, ids in document.items()} for start in starts]


def prepare(
    rows: Any,
    tokenizer: Any,
    length: int,
    packing: bool = True,
    long_documents: str = "cut",
    counts: Counter[str] | None = None,
) -> Any:
    """Rows of files as a dataset for `Trainer`: encoded, of at most `length` tokens, those without a label left out.

    Args:
        rows: of `load_files`.
        tokenizer: with a chat template for conversations.
        length: tokens in a row.
        packing: join documents into rows.
        long_documents: "cut" or "split", see `fit`.
        counts: takes how many `documents` were read, were longer than `length` (`long_documents`), and had nothing to
            learn (`documents_left_out`); of a stream, as far as it is read.

    Raises:
        ValueError: as of `encoder`; another `long_documents`; nothing is left to learn.
    """
    if long_documents not in LONG or length < 2:
        raise ValueError(f"long_documents = {long_documents!r}, length = {length}: choose cut or split, and 2 or more")
    columns = list(next(iter(rows)))
    encode, seen = encoder(columns, tokenizer), Counter() if counts is None else counts

    def pieces(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        kept: list[Encoded] = []
        for values in zip(*batch.values(), strict=True):
            document = encode(dict(zip(batch, values, strict=True)))
            learnt = [piece for piece in fit(document, length, long_documents) if _is_learnt(piece)]
            seen["documents"] += 1
            seen["long_documents"] += len(document["input_ids"]) > length
            seen["documents_left_out"] += not learnt
            kept += learnt
        return {name: [piece[name] for piece in kept] for name in ("input_ids", "labels")}

    streamed = isinstance(rows, datasets.IterableDataset)
    fresh: dict[str, Any] = {} if streamed else {"load_from_cache_file": False}
    # Named types: the first thousand rows may have nothing to learn, and tell none.
    fresh["features"] = datasets.Features(_ROW)
    learnt = rows.map(pieces, batched=True, remove_columns=columns, **fresh)
    if next(iter(learnt), None) is None:
        raise ValueError(
            f"every label is masked: no row has a token to learn in its first {length}. Look for assistant turns in "
            "the messages, or raise --max-length"
        )
    if streamed:
        seen.clear()  # the first rows of a stream will be read again
    if not packing:
        return learnt
    fresh["features"] = datasets.Features(_PACKED)
    return learnt.map(lambda batch: pack(batch, length), batched=True, batch_size=1000, **fresh)


def _is_learnt(row: Encoded) -> bool:
    """Whether any token but the first, which nothing predicts, has a label."""
    return any(label != IGNORE_INDEX for label in row["labels"][1:])


@dataclass
class PaddingCollator:
    """Rows to a batch of tensors [B, T], padded on the right to the longest.

    Packed rows carry no attention mask, by which transformers recognises documents; their padding is a document of its
    own, and `token_mask` keeps it out of the experts' balance.

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
        batch = {name: torch.tensor(values) for name, values in padded.items()}
        real = torch.arange(longest) < longest - torch.tensor(missing)[:, None]
        return batch | ({"token_mask": real} if "position_ids" in names else {"attention_mask": real.long()})
