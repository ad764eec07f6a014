"""safetensors headers, read and written without a framework: 8 bytes of length, JSON, then the tensors' bytes.

Special about it: nothing in the file is believed. Lengths are held against the file's size before anything is
allocated, and a header counts only if its tensors tile the data exactly: no gap, no overlap, no byte left over.
Source of the rules: the safetensors format description.
"""

import json
import os
import stat
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_PICKLED = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
_RESAVE = "save it again as safetensors (model.save_pretrained writes them); pickles are never opened"
_DAMAGED = "the file is damaged or cut short: copy or download it again"


class TensorInfo(NamedTuple):
    """Where one stored tensor lies.

    Attributes:
        dtype: the safetensors name, e.g. "BF16".
        shape: its shape.
        file: path of the file that holds it.
        offset: first byte, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Header(NamedTuple):
    """A file's tensors by name, in the order of their bytes, its free-form metadata, and its size in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError("the name stands twice in one JSON object", tensor=twice)
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse_json(raw: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object at the top, no name twice, no NaN.

    Raises:
        CheckpointError: it is anything else.
    """
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except CheckpointError as error:
        raise CheckpointError(error.problem, file=path, tensor=error.tensor, remedy="write the file anew") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"no valid JSON ({reason[:200]})", file=path, remedy=_DAMAGED) from None
    if not isinstance(table, dict):
        raise CheckpointError(f"a JSON object is needed, found a {type(table).__name__}", file=path, remedy=_DAMAGED)
    return table


def open_regular(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open a regular file for reading: (descriptor, size in bytes). A FIFO or a device would hang or never end.

    Raises:
        CheckpointError: no such file, unreadable, or no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        remedy = "copy or download it again" if isinstance(error, FileNotFoundError) else "make it readable"
        raise CheckpointError(f"cannot be opened ({error.strerror})", file=path, remedy=remedy) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError("is no regular file", file=path, remedy="put the file itself in its place")
    return fd, status.st_size


def _read_exactly(fd: int, size: int, path: str | os.PathLike[str]) -> bytes:
    chunks: list[bytes] = []
    while size:
        chunk = os.read(fd, min(size, 1 << 24))
        if not chunk:
            raise CheckpointError("ends in the middle", file=path, remedy=_DAMAGED)
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """A small file's bytes.

    Raises:
        CheckpointError: the file cannot be read or is larger than `limit` bytes.
    """
    fd, size = open_regular(path)
    try:
        if size > limit:
            raise CheckpointError(f"{size} bytes, at most {limit} are expected here", file=path, remedy=_DAMAGED)
        return _read_exactly(fd, size, path)
    finally:
        os.close(fd)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of one safetensors file; the tensors' bytes stay untouched.

    Raises:
        CheckpointError: the file is no safetensors file, is cut short, or its header contradicts itself.
    """
    path = os.fspath(path)
    fd, file_bytes = open_regular(path)
    try:
        raw, length = _header_bytes(fd, file_bytes, path)
    finally:
        os.close(fd)
    table = parse_json(raw, path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ does not map names to strings", file=path, remedy=_DAMAGED)
    return Header(_check_entries(table, path, 8 + length, file_bytes), metadata, file_bytes)


def _header_bytes(fd: int, file_bytes: int, path: str) -> tuple[bytes, int]:
    head, brace = os.pread(fd, 8, 0), os.pread(fd, 1, 8)
    # A header's length may begin with the same bytes.
    if brace != b"{" and head.startswith(_PICKLED):
        raise CheckpointError("is a pickle, not safetensors", file=path, remedy=_RESAVE)
    if len(head) < 8:
        raise CheckpointError(f"{file_bytes} bytes are no safetensors file", file=path, remedy=_DAMAGED)
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES:
        problem = f"a header of {length} bytes is announced, at most {MAX_HEADER_BYTES} are allowed"
        raise CheckpointError(problem, file=path, remedy="this is no safetensors file, or it is damaged")
    if length > file_bytes - 8:
        problem = f"the header ({length} bytes) is longer than the file ({file_bytes} bytes)"
        raise CheckpointError(problem, file=path, remedy=_DAMAGED)
    os.lseek(fd, 8, os.SEEK_SET)
    raw = _read_exactly(fd, length, path)
    if raw[:1] != b"{":
        raise CheckpointError("the header does not begin with '{'", file=path, remedy=_DAMAGED)
    return raw, length


def _entry(name: str, entry: Any, path: str, start: int) -> tuple[int, int, TensorInfo]:
    """(begin, end, info) of one header entry, begin and end counted from the start of the data."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(entry) != 3 or type(begin) is not int or type(end) is not int or type(shape) is not list:
            raise TypeError
        if len(shape) > _MAX_DIMENSIONS:
            raise TypeError
        for size in shape:
            if type(size) is not int or not 0 <= size < 1 << 63:
                raise TypeError
        count = prod(shape)
    except (TypeError, KeyError, ValueError):
        problem = "the header entry is not {dtype, shape, data_offsets: [begin, end]} with whole numbers"
        raise CheckpointError(problem, file=path, tensor=name, remedy=_DAMAGED) from None
    width = ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise CheckpointError(f"unknown dtype {str(dtype)[:40]!r}", file=path, tensor=name, remedy=_DAMAGED)
    if count * width != end - begin:
        problem = f"{dtype} {shape} needs another number of bytes than its offsets {begin}..{end} span"
        raise CheckpointError(problem[:400], file=path, tensor=name, remedy=_DAMAGED)
    return begin, end, TensorInfo(dtype, tuple(shape), path, start + begin)


def _check_entries(table: dict[str, Any], path: str, start: int, file_bytes: int) -> dict[str, TensorInfo]:
    placed = sorted(((*_entry(name, entry, path, start), name) for name, entry in table.items()), key=lambda e: e[:2])
    position, tensors = 0, {}
    for begin, end, info, name in placed:
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CheckpointError(f"its data {problem}", file=path, tensor=name, remedy=_DAMAGED)
        position = end
        tensors[name] = info
    if start + position != file_bytes:
        kind = "cut short" if start + position > file_bytes else "followed by bytes of no tensor"
        problem = f"the data is {kind}: the header describes {start + position} bytes, the file has {file_bytes}"
        raise CheckpointError(problem, file=path, remedy=_DAMAGED)
    return tensors


def build_header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Lay out a file of `entries` (name, dtype, shape), in their order.

    Returns:
        the file's first bytes (length and JSON, padded to a multiple of 8), the offset of every tensor from the
        start of the file, and the size of the whole file in bytes.
    """
    table: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for name, dtype, shape in entries:
        assert name not in relative, name
        end = position + prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        relative[name], position = position, end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: start + at for n, at in relative.items()}, start + position


def read_json(path: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes.

    Raises:
        CheckpointError: the file cannot be read, is too large or is no strict JSON object.
    """
    return parse_json(read_bytes(path, limit), path)
