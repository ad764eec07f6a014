"""Compares two checkpoints tensor by tensor, whatever their layouts and precisions.

Special about it: both sides are seen through the official layout, so an FP8 folder can be held against its BF16, its
fused or its sharded form. FP8 values are compared after dequantisation. What differs may do so by no more than E4M3
can round: half a step of 2**-3 of the value, or of 2**-9 scales near zero, and BF16's own rounding.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import CheckpointError
from .execution import default_workers, run_all, stopped
from .header import ITEM_BYTES
from .layouts import SCALE_SUFFIX, config_view, mtp_layers, official_views, part_of
from .reader import CONFIG_NAME, Checkpoint, open_checkpoint
from .report import aligned
from .views import Source, View

_BATCH_BYTES = 1 << 28
_BAND_ELEMENTS = 1 << 20
_BLOCK = 128
_COMPARABLE = ("F8_E4M3", "BF16", "F16", "F32")
# Half of E4M3's relative step and BF16's rounding; half of its step below the smallest normal code.
_RELATIVE, _ABSOLUTE = 2.0**-4 + 2.0**-8, 2.0**-10


class Side(NamedTuple):
    """One tensor of one checkpoint: its view, and its scales if it is FP8."""

    view: View
    scale: View | None


class Result(NamedTuple):
    """Outcome for one tensor.

    Attributes:
        status: "identical", "rounded" or "different".
        error: largest absolute difference.
        checksums: of both sides' values, where asked for: equal for one value in whatever layout or precision.
    """

    status: str
    error: float
    checksums: tuple[str, str] | None = None


@dataclass
class Comparison:
    """The outcome of `compare`.

    Attributes:
        parts: part of the model -> counts of "identical", "rounded", "different", and the largest "error".
        problems: tensor -> what is wrong with it: missing, extra, misshapen, different.
        rounded: tensors that differ by what FP8 rounds and no more, with their largest absolute difference.
        tensors: with `checksums`, every tensor that both have -> its outcome.
    """

    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Result] = field(default_factory=dict)

    def agrees(self, *, exact: bool = False) -> bool:
        """Whether the two hold the same model, up to FP8's rounding or, with `exact`, to the last bit."""
        return not self.problems and not (exact and self.rounded)

    def as_dict(self) -> dict[str, Any]:
        """The outcome for JSON."""
        found = asdict(self)
        found["tensors"] = {name: result._asdict() for name, result in self.tensors.items()}
        for counts in (*found["parts"].values(), *found["tensors"].values()):
            # JSON has no infinity.
            counts["error"] = counts["error"] if np.isfinite(counts["error"]) else None
        return {"agrees": self.agrees(), "exact": self.agrees(exact=True), **found}

    def table(self) -> str:
        """An aligned table, one row for each part, and the first problems by name."""
        rows: list[tuple[str, ...]] = [("part", "tensors", "identical", "FP8-rounded", "different", "max |a - b|")]
        for part, counts in sorted(self.parts.items()):
            kinds = [int(counts[key]) for key in ("identical", "rounded", "different")]
            rows.append((part, str(sum(kinds)), *(str(count) for count in kinds), f"{counts['error']:.3g}"))
        lines = []
        if self.tensors:
            titles = ("tensor", "status", "max |a - b|", "checksum of A", "checksum of B")
            results = [(n, r.status, f"{r.error:.3g}", *(r.checksums or ())) for n, r in sorted(self.tensors.items())]
            lines = [*aligned([titles, *results]), ""]
        lines += aligned(rows)
        lines += [f"{what}: {name}" for name, what in list(self.problems.items())[:20]]
        if len(self.problems) > 20:
            lines.append(f"... and {len(self.problems) - 20} more")
        return "\n".join(lines)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    workers: int | None = None,
    without_mtp: bool = False,
    checksums: bool = False,
    config: dict[str, Any] | None = None,
) -> Comparison:
    """Compare two checkpoints: names, shapes, dtypes and every value.

    Args:
        a, b: folders of any layout.
        workers: processes, None for one a core, 0 for this process.
        without_mtp: leave the MTP layers out, as DeepSeek's inference layout does.
        checksums: also give each tensor's outcome, and checksums of its values on both sides.
        config: used for rank files without a config.json of their own.

    Raises:
        CheckpointError: a folder is no sound checkpoint.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    known = [left.config, right.config, config or {}]
    fallback = next((raw for raw in known if raw), {})
    sides = [_sides(checkpoint, fallback) for checkpoint in (left, right)]
    first_mtp = min(mtp_layers(sides[0].keys() | sides[1].keys()), default=inf)
    result, pairs = Comparison(), []
    for name in [*sides[0], *(sides[1].keys() - sides[0].keys())]:
        if without_mtp and part_of(name, first_mtp) == "mtp":
            continue
        one, two = sides[0].get(name), sides[1].get(name)
        problem = _difference_in_form(one, two)
        if problem:
            result.problems[name] = problem
        elif one and two:
            pairs.append((name, one, two))
    batches = _batches(pairs)
    calls = [([(one, two) for _, one, two in batch], checksums) for batch in batches]
    workers = default_workers() if workers is None else workers
    for index, outcome in run_all(_compare_batch, calls, workers=workers, needs_codec=True):
        for (name, _, _), one_result in zip(batches[index], outcome, strict=True):
            _record(result, name, part_of(name, first_mtp), one_result)
            if checksums:
                result.tensors[name] = one_result
    return result


def _sides(checkpoint: Checkpoint, fallback: dict[str, Any]) -> dict[str, Side]:
    view = None
    if checkpoint.layout == "inference":
        raw, file = checkpoint.config or fallback, checkpoint.folder / CONFIG_NAME
        if not raw:
            raise CheckpointError("is missing", file=file, remedy="put the model's config.json there")
        view = config_view({**raw, **_all_mtp(checkpoint, raw)}, file)
    views = official_views(checkpoint, view)
    sides = {}
    for name, stored in views.items():
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in views:
            continue
        scale = views.get(name + SCALE_SUFFIX) if stored.dtype == "F8_E4M3" else None
        if stored.dtype == "F8_E4M3" and scale is None:
            problem = "the scale of this matrix is missing"
            where = stored.tiles[0].file if stored.tiles else str(checkpoint.folder)
            raise CheckpointError(problem, file=where, tensor=name, remedy="download it again")
        if scale is not None and (scale.rows, scale.columns) != (
            -(-stored.rows // _BLOCK),
            -(-stored.columns // _BLOCK),
        ):
            problem = f"scales of shape {list(scale.shape)} do not fit a matrix of shape {list(stored.shape)}"
            where = scale.tiles[0].file if scale.tiles else str(checkpoint.folder)
            raise CheckpointError(problem, file=where, tensor=name, remedy="download it again")
        sides[name] = Side(stored, scale)
    return sides


def _all_mtp(checkpoint: Checkpoint, raw: dict[str, Any]) -> dict[str, int]:
    """How many MTP modules the rank files really hold, which a borrowed config.json may not know."""
    first = raw.get("num_hidden_layers")
    names = checkpoint.ranks[0]
    depth = 0
    while isinstance(first, int) and f"layers.{first + depth}.enorm.weight" in names:
        depth += 1
    return {"num_nextn_predict_layers": depth}


def _difference_in_form(one: Side | None, two: Side | None) -> str | None:
    if one is None:
        return "only in the second"
    if two is None:
        return "only in the first"
    if one.view.shape != two.view.shape:
        return f"shape {list(one.view.shape)} against {list(two.view.shape)}"
    dtypes = one.view.dtype, two.view.dtype
    if dtypes[0] != dtypes[1] and not all(dtype in _COMPARABLE for dtype in dtypes):
        return f"dtype {dtypes[0]} against {dtypes[1]}"
    return None


def _batches(pairs: list[tuple[str, Side, Side]]) -> list[list[tuple[str, Side, Side]]]:
    batches: list[list[tuple[str, Side, Side]]] = []
    filled = _BATCH_BYTES
    for pair in pairs:
        if filled >= _BATCH_BYTES:
            batches.append([])
            filled = 0
        batches[-1].append(pair)
        # A small tensor costs its opening, not its bytes.
        filled += pair[1].view.nbytes + pair[2].view.nbytes + (1 << 18)
    return batches


def _record(result: Comparison, name: str, part: str, outcome: Result) -> None:
    counts = result.parts.setdefault(part, {"identical": 0, "rounded": 0, "different": 0, "error": 0.0})
    counts[outcome.status] += 1
    counts["error"] = max(counts["error"], outcome.error)
    if outcome.status == "different":
        result.problems[name] = f"values differ by up to {outcome.error:.3g}"
    elif outcome.status == "rounded":
        result.rounded[name] = outcome.error


def _compare_batch(pairs: list[tuple[Side, Side]], checksums: bool) -> list[Result]:
    results = []
    with Source() as source:
        for one, two in pairs:
            if stopped():
                break
            result = _compare_tensor(one, two, source)
            if checksums:
                result = result._replace(checksums=(_checksum(one, source), _checksum(two, source)))
            results.append(result)
    return results


def _step(view: View) -> int:
    """Rows of a band of whole blocks."""
    return max(1, _BAND_ELEMENTS // max(1, view.columns * _BLOCK)) * _BLOCK


def _checksum(side: Side, source: Source) -> str:
    """Of the values as float32, FP8 after dequantisation to BF16; other dtypes' of the stored bytes."""
    digest = hashlib.blake2b(digest_size=8)
    table, step = None if side.scale is None else _table(side.scale, source), _step(side.view)
    for begin in range(0, side.view.rows, step):
        end = min(begin + step, side.view.rows)
        raw = source.rows(side.view, begin, end)
        if side.view.dtype in _COMPARABLE:
            raw = _values(raw, side.view.dtype, None if table is None else table[begin // _BLOCK : -(-end // _BLOCK)])
        digest.update(np.ascontiguousarray(raw).data)
    return digest.hexdigest()


def _compare_tensor(one: Side, two: Side, source: Source) -> Result:
    tables = [None if side.scale is None else _table(side.scale, source) for side in (one, two)]
    same_kind = one.view.dtype == two.view.dtype
    same_scale = tables[0] is None or tables[1] is None or np.array_equal(tables[0], tables[1])
    # Scales may differ in bits that BF16 values do not show.
    worst, excess, unequal = 0.0, False, not same_scale
    step = _step(one.view)
    for begin in range(0, one.view.rows, step):
        end = min(begin + step, one.view.rows)
        raw = [source.rows(side.view, begin, end) for side in (one, two)]
        if same_kind and same_scale and np.array_equal(raw[0], raw[1]):
            continue
        if one.view.dtype not in _COMPARABLE:
            return Result("different", float("nan"))
        bands = [t if t is None else t[begin // _BLOCK : -(-end // _BLOCK)] for t in tables]
        values = [_values(r, s.view.dtype, t) for r, s, t in zip(raw, (one, two), bands, strict=True)]
        difference = np.abs(values[0] - values[1])
        # NaN against anything is a difference, and so is a difference that overflows.
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
        # Only bits tell one zero from the other.
        unequal = unequal or not np.array_equal(values[0].view(np.uint32), values[1].view(np.uint32))
        allowed = sum((_allowance(v, t) for v, t in zip(values, bands, strict=True) if t is not None), np.float32(0))
        # What rounds is finite; an infinite value would allow itself any difference.
        excess = excess or not bool((np.isfinite(difference) & (difference <= allowed)).all())
    quantised = any(table is not None for table in tables)
    if excess or (unequal and not quantised):
        return Result("different", worst)
    return Result("rounded" if unequal else "identical", worst)


def _table(scale: View, source: Source) -> np.ndarray:
    from .writer import scales

    return scales(scale, source)


def _values(raw: np.ndarray, dtype: str, table: np.ndarray | None) -> np.ndarray:
    from . import codec

    if dtype == "F8_E4M3":
        assert table is not None
        try:
            raw, dtype = codec.decode(raw, table), "BF16"
        except codec.BadValues:
            return np.full(raw.shape, np.nan, np.float32)
    if dtype == "BF16":
        return codec.widen(raw, dtype).view(np.float32)
    return np.ascontiguousarray(raw).view(np.float16 if ITEM_BYTES[dtype] == 2 else np.float32).astype(np.float32)


def _allowance(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """How far a value may lie from what was rounded to it, by element."""
    rows, columns = values.shape
    spread = np.repeat(np.repeat(table, _BLOCK, 0)[:rows], _BLOCK, 1)[:, :columns]
    return np.abs(values) * np.float32(_RELATIVE) + spread * np.float32(_ABSOLUTE)
