"""What a conversion is made of: items (tensors that must share a file), steps that fill them, files laid out.

Plain tuples throughout, so that a plan travels to worker processes as it is and can be fingerprinted.
"""

from collections.abc import Iterable
from math import prod
from typing import Literal, NamedTuple

from .header import ITEM_BYTES, build_header
from .views import View

StepKind = Literal["copy", "widen", "dequantise", "quantise"]


class Step(NamedTuple):
    """One piece of work that fills a contiguous range of an output file.

    Attributes:
        kind: "copy" of the bytes; "widen" BF16 or E8M0 to F32; "dequantise" FP8 to BF16; "quantise" BF16 to FP8.
        tensor: the official name, for messages.
        source: the matrix that is read.
        scale: for "dequantise", its scales.
        offset: where the result goes; while an item is planned relative to its tensor, afterwards to the file.
        scale_offset: for "quantise", where the scales go.
        scale_fmt: for "quantise", None or "ue8m0".
        like: for "quantise", codes and scales that are taken instead if they stand for exactly these values.
    """

    kind: StepKind
    tensor: str
    source: View
    scale: View | None = None
    offset: int = 0
    scale_offset: int = 0
    scale_fmt: str | None = None
    like: tuple[View, View] | None = None


class Entry(NamedTuple):
    """A tensor of an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Item(NamedTuple):
    """Tensors that are written together (a matrix, or codes and scales) and the steps that fill the first one."""

    entries: tuple[Entry, ...]
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.nbytes for entry in self.entries)


class Job(NamedTuple):
    """One output file: its name, first bytes, size in bytes, the steps that fill it, and its tensors' names."""

    file: str
    header: bytes
    nbytes: int
    steps: tuple[Step, ...]
    tensors: tuple[str, ...]


def lay_out(file: str, items: Iterable[Item]) -> Job:
    """Place items in a file: wide element types first, so that every tensor is aligned, else in their order."""
    items = list(items)
    entries = [entry for item in items for entry in item.entries]
    entries.sort(key=lambda entry: -ITEM_BYTES[entry.dtype])
    header, offsets, nbytes = build_header(entries)
    steps = []
    for item in items:
        base = offsets[item.entries[0].name]
        scale_base = offsets[item.entries[1].name] if len(item.entries) > 1 else 0
        for step in item.steps:
            steps.append(step._replace(offset=base + step.offset, scale_offset=scale_base + step.scale_offset))
    # In the order of the file, so that it is written from front to back.
    steps.sort(key=lambda step: step.offset)
    return Job(file, header, nbytes, tuple(steps), tuple(entry.name for entry in entries))


def pack(items: Iterable[Item], limit: int) -> list[list[Item]]:
    """Cut a sequence of items into groups of at most `limit` bytes (one item may be larger on its own)."""
    groups: list[list[Item]] = []
    filled = 0
    for item in items:
        if not groups or filled + item.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += item.nbytes
    return groups


def shard_file(number: int, count: int) -> str:
    """The official files' name of shard `number` (from 1) of `count`."""
    return f"model-{number:05d}-of-{count:06d}.safetensors"
