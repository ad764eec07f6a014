"""Writes one output file: to a temporary name, step by step at known offsets, flushed to the disk, then renamed.

Whatever goes wrong, the file under its final name is whole or absent, and the temporary one is gone (after a SIGKILL
the next run removes it). Memory in use is a band of rows, whatever the size of the tensor.
"""

import errno
import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError
from .header import ITEM_BYTES, open_regular
from .steps import Job, Step
from .views import Source, Tile, View

_PARTIAL = re.compile(r"\..+\.\d+\.partial")
# Elements of a band: large enough that calls cost nothing, small enough for the caches.
_BAND_ELEMENTS = 1 << 20
_COPY_BYTES = 1 << 26
_BLOCK_ROWS = 128
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(Exception):
    """Another part of the same conversion failed, so this one is no longer needed."""


def _never() -> bool:
    return False


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_partials(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file name is one of the temporary names used here."""
    return _PARTIAL.fullmatch(name) is not None


@contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """A descriptor of a new file that gets its name when the block ends well, and vanishes when it does not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_all(fd: int, data: Any, offset: int) -> None:
    """Write a buffer at an offset, whole."""
    rest = memoryview(data).cast("B")
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def write_json(path: Path, value: Any) -> None:
    """Write JSON as the official files have it: two spaces, a line end, no NaN."""
    with atomic_file(path) as fd:
        write_all(fd, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(), 0)


def copy_range(source: int, target: int, begin: int, offset: int, nbytes: int, stop: Callable[[], bool]) -> None:
    """Copy bytes between descriptors inside the kernel where it can, else through a buffer of at most 64 MiB."""
    while nbytes:
        if stop():
            raise Stopped
        size = min(nbytes, _COPY_BYTES)
        try:
            copied = os.copy_file_range(source, target, size, begin, offset)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            copied = 0
        if not copied:
            data = os.pread(source, size, begin)
            if not data:
                raise CheckpointError("a source file became shorter while it was read", remedy="convert again")
            write_all(target, data, offset)
            copied = len(data)
        begin, offset, nbytes = begin + copied, offset + copied, nbytes - copied


def copy_file(source: Path, target: Path) -> None:
    """Copy a small regular file under the same guarantees as a shard."""
    fd, size = open_regular(source)
    try:
        with atomic_file(target) as out:
            copy_range(fd, out, 0, 0, size, _never)
    finally:
        os.close(fd)


def write_job(job: Job, folder: Path, device: str = "cpu", stop: Callable[[], bool] = _never) -> int:
    """Write one planned file.

    Args:
        job: what is to be written.
        folder: where.
        device: where FP8 is encoded and decoded.
        stop: asked between pieces of work; True abandons the file.

    Returns:
        peak resident memory of this process so far, in bytes.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        OSError: the disk is full, or fails.
        Stopped: `stop` said so.
    """
    with atomic_file(folder / job.file) as fd, Source() as source:
        write_all(fd, job.header, 0)
        for step in job.steps:
            if stop():
                raise Stopped
            _run(step, source, fd, device, stop)
        if os.fstat(fd).st_size < job.nbytes:
            os.ftruncate(fd, job.nbytes)
    # Linux counts this in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bands(view: View) -> Iterator[tuple[int, int]]:
    """Row ranges of whole 128-row blocks with about _BAND_ELEMENTS elements."""
    blocks = max(1, _BAND_ELEMENTS // max(1, view.columns * _BLOCK_ROWS))
    for begin in range(0, view.rows, blocks * _BLOCK_ROWS):
        yield begin, min(begin + blocks * _BLOCK_ROWS, view.rows)


def _run(step: Step, source: Source, fd: int, device: str, stop: Callable[[], bool]) -> None:
    if step.kind == "copy":
        _copy(step.source, source, fd, step.offset, stop)
        return
    # Plain re-sharding needs no torch, and a fresh process should not pay for importing it.
    from . import codec

    try:
        if step.kind == "dequantise":
            _dequantise(step, source, fd, device, stop)
        elif step.kind == "quantise":
            if not (step.like and _same_values(step, source, device)):
                _quantise(step, source, fd, device, stop)
            else:
                _copy(step.like[0], source, fd, step.offset, stop)
                write_all(fd, scales(step.like[1], source), step.scale_offset)
        else:
            write_all(fd, codec.widen(source.array(step.source), step.source.dtype), step.offset)
    except codec.BadValues as error:
        file = step.source.tiles[0].file
        raise CheckpointError(str(error), file=file, tensor=step.tensor, remedy="download the file again") from None


def _whole(tile: Tile) -> bool:
    return tile.columns == tile.stride


def _copy(view: View, source: Source, fd: int, offset: int, stop: Callable[[], bool]) -> None:
    width = ITEM_BYTES[view.dtype]
    if view.axis == 0 and all(_whole(tile) for tile in view.tiles):
        for tile in view.tiles:
            begin, nbytes = tile.offset + tile.row * tile.stride * width, tile.rows * tile.columns * width
            copy_range(source.descriptor(tile.file), fd, begin, offset, nbytes, stop)
            offset += nbytes
        return
    for begin, end in _bands(view):
        if stop():
            raise Stopped
        write_all(fd, np.ascontiguousarray(source.rows(view, begin, end)), offset + begin * view.columns * width)


def scales(view: View, source: Source) -> np.ndarray:
    """A scale tensor as float32 [rows, columns], whichever way it is stored."""
    raw = source.array(view)
    if view.dtype == "F8_E8M0":
        from .codec import widen

        raw = widen(raw, view.dtype)
    return np.ascontiguousarray(raw).view(np.float32)


def _dequantise(step: Step, source: Source, fd: int, device: str, stop: Callable[[], bool]) -> None:
    from .codec import decode

    assert step.scale is not None
    table = scales(step.scale, source)
    for begin, end in _bands(step.source):
        if stop():
            raise Stopped
        band = table[begin // _BLOCK_ROWS : -(-end // _BLOCK_ROWS)]
        bits = decode(source.rows(step.source, begin, end), band, device)
        write_all(fd, bits, step.offset + begin * step.source.columns * 2)


def _quantise(step: Step, source: Source, fd: int, device: str, stop: Callable[[], bool]) -> None:
    from .codec import encode

    scale_columns = -(-step.source.columns // _BLOCK_ROWS)
    for begin, end in _bands(step.source):
        if stop():
            raise Stopped
        codes, scale = encode(source.rows(step.source, begin, end), step.scale_fmt, device)
        write_all(fd, codes, step.offset + begin * step.source.columns)
        write_all(fd, scale, step.scale_offset + (begin // _BLOCK_ROWS) * scale_columns * 4)


def _same_values(step: Step, source: Source, device: str) -> bool:
    """Whether the codes and scales of `step.like` stand for exactly the source's values."""
    from .codec import decode

    assert step.like is not None
    codes, table = step.like[0], scales(step.like[1], source)
    for begin, end in _bands(step.source):
        band = table[begin // _BLOCK_ROWS : -(-end // _BLOCK_ROWS)]
        values = decode(source.rows(codes, begin, end), band, device)
        if not np.array_equal(values, source.rows(step.source, begin, end)):
            return False
    return True
