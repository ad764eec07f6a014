"""Texts read, shuffled and packed while training, from where a checkpoint stopped.

Special about it: the place of every block is a few numbers, so that a checkpoint holds no text and resuming reads
almost nothing again. Texts are shuffled in windows: `shuffle_buffer` of them are read and permuted by the seed, the
pass and the window's number, then the next. A place is a window, with the source's own state at its start, a text in
it and a token in that text.
"""

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback

from .data import ROW_FILES, draw, read_texts, text_of, text_rows

# Texts that the tokenizer gets at once.
_GROUP = 32


class Source:
    """The texts of files one after another, from a place on, with the place that is reached.

    Each JSONL or Parquet file is a data set by itself: the state that `datasets` gives for several files loses their
    number when it is taken after going on from one.

    Args:
        files: in the order in which they are read.
        place: as of `place`; None begins.
    """

    def __init__(self, files: Sequence[Path], place: dict[str, Any] | None = None) -> None:
        self.files = files
        self.file: int = 0 if place is None else place["file"]
        self._state: Any = None if place is None else place["rows"]
        self._rows: Any = None

    def place(self) -> dict[str, Any]:
        """Where the next text is: a file's number, and the state of `datasets` in it; made for JSON."""
        return {"file": self.file, "rows": None if self._rows is None else self._rows.state_dict()}

    def __iter__(self) -> Iterator[str]:
        while self.file < len(self.files):
            file = self.files[self.file]
            if file.suffix in ROW_FILES:
                self._rows = text_rows([file])
                if self._state is not None:
                    self._rows.load_state_dict(self._state)
                yield from (text_of(row, file) for row in self._rows)
                self._rows = self._state = None
                self.file += 1
            else:
                self.file += 1
                yield from (text for _, text in read_texts([file]))


def is_held_out(text: str, share: float) -> bool:
    """Whether a text of a stream is for evaluation: by its content, so that copies are on one side."""
    return draw(text) < share


def stream_texts(files: Sequence[Path], held_out: float, evaluated: bool) -> Iterator[str]:
    """The texts of one pass in the files' order: those to train on, or those that are kept for evaluation."""
    for text in Source(files):
        if text.strip() and is_held_out(text, held_out) == evaluated:
            yield text


class PackedStream(torch.utils.data.IterableDataset):
    """Blocks of tokens without an end, pass after pass over the files; each as `data.pack` makes them.

    Args:
        files: texts, or JSONL, JSON and Parquet files with a column `text`.
        tokenizer: any tokenizer with BOS and EOS.
        length: tokens in a block.
        mask_documents: add `position_ids` that restart at each text.
        shuffle_buffer: texts that are permuted together; the files are permuted in each pass too. 0 keeps the order.
        seed: of both.
        held_out: share of the texts that is left out.
    """

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Any,
        length: int,
        mask_documents: bool = False,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        held_out: float = 0.0,
    ) -> None:
        self.files, self.tokenizer, self.length = list(files), tokenizer, length
        self.mask_documents, self.shuffle_buffer, self.seed = mask_documents, shuffle_buffer, seed
        self.held_out = held_out
        self.start: dict[str, Any] = {"blocks": 0, "pass": 0, "window": 0, "source": None, "text": 0, "token": 0}
        self._places: dict[int, dict[str, Any]] = {}

    def place_at(self, blocks: int) -> dict[str, Any]:
        """Where the block after `blocks` blocks begins, for `start`; forgets the places before it."""
        self._places = {count: place for count, place in self._places.items() if count >= blocks}
        return self._places[blocks]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        blocks, begin = self.start["blocks"], self.start["token"]
        self._places = {blocks: self.start}
        tokens: list[int] = []
        positions: list[int] = []
        for place, document in self._documents():
            while begin < len(document):
                end = min(len(document), begin + self.length - len(tokens))
                tokens += document[begin:end]
                positions += range(begin, end)
                begin = end
                if len(tokens) == self.length:
                    blocks += 1
                    self._places[blocks] = {**place, "blocks": blocks, "token": begin}
                    yield self._block(tokens, positions)
                    tokens, positions = [], []
            begin = 0

    def _block(self, tokens: list[int], positions: list[int]) -> dict[str, list[int]]:
        block = {"input_ids": tokens, "labels": tokens}
        return {**block, "position_ids": positions} if self.mask_documents else block

    def _documents(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Token ids of every text from `start` on, with its place."""
        begin = self.start["text"]
        for place, texts in self._windows():
            for first in range(begin, len(texts), _GROUP):
                group = texts[first : first + _GROUP]
                encoded = self.tokenizer(group, add_special_tokens=False)["input_ids"]
                for i, ids in enumerate(encoded, first):
                    yield {**place, "text": i}, [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
            begin = 0

    def _windows(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        place = {name: self.start[name] for name in ("pass", "window", "source")}
        while True:
            found = place["window"] > 0
            source = Source(self._order(place["pass"]), place["source"])
            rest = iter(source)
            while texts := list(islice(rest, self.shuffle_buffer or _GROUP)):
                kept = [text for text in texts if text.strip() and not is_held_out(text, self.held_out)]
                if self.shuffle_buffer:
                    random.Random(f"{self.seed} {place['pass']} {place['window']}").shuffle(kept)
                found = found or bool(kept)
                yield place, kept
                place = {**place, "window": place["window"] + 1, "source": source.place()}
            if not found:
                raise ValueError(f"no text to train on in {self.files[0]} and {len(self.files) - 1} more files")
            place = {"pass": place["pass"] + 1, "window": 0, "source": None}

    def _order(self, number: int) -> list[Path]:
        files = list(self.files)
        if self.shuffle_buffer:
            random.Random(f"{self.seed} {number}").shuffle(files)
        return files


class StepStream(torch.utils.data.IterableDataset):
    """One list of rows for each optimizer step, as `schedules.StepBatches` draws them, of data without a length.

    Passes over the data follow one another. A `PackedStream` goes on from its `start`; other data begins anew, and
    what a resumed run has seen is for the caller to skip. Every rank reads all rows and keeps its share.

    Args:
        rows: anything that can be iterated over again; its `set_epoch`, where there is one, is told the pass.
        sizes: sequences in each step, over all ranks.
        rank, ranks: this process and how many there are.

    Raises:
        ValueError: a pass gives no row; a stream's start is not the end of one of these steps.
    """

    def __init__(self, rows: Iterable[Any], sizes: Sequence[int], rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.sizes, self.rank, self.ranks = rows, list(sizes), rank, ranks

    def __iter__(self) -> Iterator[list[Any]]:
        rows = self._passes()
        for size in self.sizes[self._begin() :]:
            yield list(islice(rows, size))[self.rank :: self.ranks]

    def _begin(self) -> int:
        """The step that comes after the rows that a stream does not give again."""
        read = self.rows.start["blocks"] if isinstance(self.rows, PackedStream) else 0
        ends = [0, *accumulate(self.sizes)]
        step = bisect_left(ends, read)
        if step == len(ends) or ends[step] != read:
            raise ValueError(
                f"the checkpoint was made after {read} blocks, where no step of this batch ramp ends: "
                "resume with the ramp that the run began with"
            )
        return step

    def _passes(self) -> Iterator[Any]:
        number = 0
        while True:
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(number)
            row = None
            for row in self.rows:
                yield row
            if row is None:
                raise ValueError("the training data gives no row")
            number += 1


class StreamCallback(TrainerCallback, ExportableState):
    """Keeps the stream's place in Trainer's checkpoints.

    Args:
        stream: what Trainer trains on.
        sizes: blocks in each optimizer step, where they differ.
    """

    def __init__(self, stream: PackedStream, sizes: Sequence[int] | None = None) -> None:
        self.stream = stream
        self.place: dict[str, Any] | None = None
        self._read = None if sizes is None else [0, *accumulate(sizes)]

    def state(self) -> dict[str, Any]:
        """What Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": {"place": self.place}}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer's own count begins anew in a resumed run that skips no data.
        state.epoch = state.global_step / state.max_steps
        if state.is_world_process_zero:  # accelerate hands the others their part, or they read the same
            blocks = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            read = state.global_step * blocks if self._read is None else self._read[state.global_step]
            self.place = self.stream.place_at(read)


def saved_place(stateful_callbacks: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The place that a checkpoint holds.

    Raises:
        ValueError: it is not of a streamed run.
    """
    kept = stateful_callbacks.get(StreamCallback.__name__)
    if kept is None:
        raise ValueError(f"{checkpoint} is of a run without --stream; resume it without")
    kept = kept[-1] if isinstance(kept, list) else kept
    place: dict[str, Any] = kept["attributes"]["place"]
    return place
