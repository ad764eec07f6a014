"""How the commands print what they found."""

from collections.abc import Iterable
from typing import Any


def aligned(rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right; integers with thousands' commas."""
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in texts]


def readable(nbytes: int) -> str:
    """A number of bytes in the largest unit, of powers of a thousand, that leaves at least ten hundredths."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit // 10:
            return f"{nbytes / unit:,.2f} {name}"
    return f"{nbytes} B"
