"""Matrices that are put together from rectangles of stored tensors, described without reading a byte.

Special about it: a view is a few numbers, so cutting a tensor for eight ranks, or joining eight ranks' pieces, is
arithmetic; the bytes are touched band by band when the result is written. Every tensor counts as [rows, columns]:
leading dimensions are rows, and a vector is one column wide.
"""

import mmap
import os
from collections import OrderedDict
from math import prod
from typing import NamedTuple

import numpy as np

from .header import ITEM_BYTES, TensorInfo, open_regular

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_OPEN_FILES = 32
# Asked for ahead of each mapped band: faults alone make the disk wait for the processor and the reverse.
_PREFETCH_BYTES = 16 << 20
_BAND_BYTES = 1 << 19


class Tile(NamedTuple):
    """Rows and columns out of one stored matrix that is `stride` elements wide and begins at `offset` bytes."""

    file: str
    offset: int
    stride: int
    row: int
    column: int
    rows: int
    columns: int


class View(NamedTuple):
    """Tiles side by side: one above the other (axis 0) or left to right (axis 1).

    Attributes:
        dtype: safetensors name of the elements' type.
        shape: the shape it is to be stored with; [rows, columns] of the tiles when leading dimensions are merged.
        axis: along which the tiles follow each other.
        tiles: the rectangles.
    """

    dtype: str
    shape: tuple[int, ...]
    axis: int
    tiles: tuple[Tile, ...]

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else prod(self.shape)

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def view_of(info: TensorInfo) -> View:
    """The view of a whole stored tensor."""
    rows = prod(info.shape[:-1]) if len(info.shape) > 1 else prod(info.shape)
    columns = info.shape[-1] if len(info.shape) > 1 else 1
    return View(info.dtype, info.shape, 0, (Tile(info.file, info.offset, columns, 0, 0, rows, columns),))


def window(view: View, axis: int, begin: int, end: int, shape: tuple[int, ...] | None = None) -> View:
    """Rows (axis 0) or columns (axis 1) `begin` to `end` of a view, as a matrix or with the given shape."""
    tiles: list[Tile] = []
    position = 0
    for tile in view.tiles:
        extent = tile.columns if axis else tile.rows
        # Across the direction in which the tiles follow each other, every tile is cut alike.
        start = position if axis == view.axis else 0
        low, high = max(begin - start, 0), min(end - start, extent)
        position += extent
        if low >= high:
            continue
        if axis:
            tiles.append(tile._replace(column=tile.column + low, columns=high - low))
        else:
            tiles.append(tile._replace(row=tile.row + low, rows=high - low))
    if shape is None:
        if len(view.shape) == 1:
            shape = (end - begin,)
        else:
            shape = (view.rows, end - begin) if axis else (end - begin, view.columns)
    return View(view.dtype, shape, view.axis, tuple(tiles))


def join(views: list[View], axis: int) -> View:
    """Views of single tiles put one above the other (axis 0) or left to right (axis 1)."""
    assert all(len(view.tiles) == 1 for view in views)
    shape = list(views[0].shape)
    dimension = 0 if axis == 0 else len(shape) - 1
    shape[dimension] = sum(view.shape[dimension] for view in views)
    return View(views[0].dtype, tuple(shape), axis, tuple(view.tiles[0] for view in views))


class Source:
    """Reads views from memory-mapped files, keeping a few files open. Used by one process at a time."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._asked: dict[str, int] = {}

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, file: str) -> int:
        """A read-only descriptor of `file`; the source closes it."""
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = open_regular(file)[0]
        return self._open[file]

    def _read_ahead(self, file: str, fd: int, begin: int, end: int) -> None:
        """Have the system read on beyond a band, once for each stretch of the file; not beyond a small tensor."""
        if end - begin < _BAND_BYTES:
            return
        asked = self._asked.get(file, 0)
        if not begin <= asked <= end + _PREFETCH_BYTES:
            asked = begin
        if asked < end + _PREFETCH_BYTES // 2:
            os.posix_fadvise(fd, asked, end + _PREFETCH_BYTES - asked, os.POSIX_FADV_WILLNEED)
            self._asked[file] = end + _PREFETCH_BYTES

    def tile(self, tile: Tile, width: int, row: int, rows: int) -> np.ndarray:
        """[rows, columns] of a tile from its row `row` on, mapped and not copied; elements of `width` bytes raw."""
        if rows * tile.columns == 0:
            return np.empty((rows, tile.columns), _RAW[width])
        first = tile.offset + (tile.row + row) * tile.stride * width
        base = first - first % mmap.ALLOCATIONGRANULARITY
        length = first - base + rows * tile.stride * width
        fd = self.descriptor(tile.file)
        self._read_ahead(tile.file, fd, base, base + length)
        # Copy-on-write, never written to: torch warns of arrays that it may not write.
        mapping = mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=base)
        raw = np.frombuffer(mapping, np.uint8, rows * tile.stride * width, first - base)
        return raw.view(_RAW[width]).reshape(rows, tile.stride)[:, tile.column : tile.column + tile.columns]

    def rows(self, view: View, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end` of a view as unsigned integers of the elements' width."""
        width = ITEM_BYTES[view.dtype]
        if view.axis == 1:
            pieces = [self.tile(tile, width, begin, end - begin) for tile in view.tiles]
        else:
            pieces, position = [], 0
            for tile in view.tiles:
                low, high = max(begin - position, 0), min(end - position, tile.rows)
                position += tile.rows
                if low < high:
                    pieces.append(self.tile(tile, width, low, high - low))
        if not pieces:
            return np.empty((end - begin, view.columns), _RAW[width])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=view.axis)

    def array(self, view: View) -> np.ndarray:
        """The whole view as unsigned integers of the elements' width, [rows, columns]."""
        return self.rows(view, 0, view.rows)
