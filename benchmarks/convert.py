"""Speed of checkpoint conversion as a ratio to a plain copy of the bytes written, both timed in turn in one run.

The checkpoint is one expert layer of DeepSeek-V3 at true dimensions, made up here; `--experts` sets its size (256 is
the published layer, 11.5 GB in FP8). Both sides end with the files flushed to the disk. Caches are dropped before each
timing where the system lets us. Workers are started once before the first timing: the seconds that importing takes do
not grow with the checkpoint. Correctness comes first; a row that is wrong prints no speed.

    python benchmarks/convert.py [--experts 24] [--rounds 5] [--workers 2] [--device cuda] [--only bf16 fp8 ...]
        [--output FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors import safe_open

from benchmarks.common import machine
from deepseek_v3.configuration.presets import PRESETS
from deepseek_v3.conversion import compare, convert, open_checkpoint, write_checkpoint

# Name -> source, target of `convert`, its options, the ratio to reach.
CASES: dict[str, tuple[str, str, dict[str, Any], float | None]] = {
    "bf16": ("fp8", "bf16", {}, 0.5),
    "fp8": ("bf16", "fp8", {}, 0.4),
    "ue8m0": ("bf16", "fp8", {"scale_fmt": "ue8m0"}, 0.4),
    "inference": ("fp8", "inference", {"model_parallel": 8}, 0.7),
    "from-inference": ("inference", "fp8", {"shard_bytes": 200_000_000}, 0.7),
    "fused": ("bf16", "fused", {}, None),
}


@dataclass
class Row:
    """One conversion. Times in seconds (medians), bytes as written; ratio is the copy's time over ours."""

    case: str
    source: str
    written_bytes: int
    correct: bool
    seconds: float | None = None
    copy_seconds: float | None = None
    ratio: float | None = None
    ratio_lowest: float | None = None
    ratio_highest: float | None = None
    target_ratio: float | None = None
    gb_per_s: float | None = None
    peak_rss_bytes: int | None = None
    rss_bound_bytes: int | None = None


def drop_caches() -> bool:
    """Write everything out and forget what was read; False where only root of the machine may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def plain_copy(source: Path, target: Path) -> None:
    """`cp` and a flush to the disk, as every conversion ends."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def timed(function: Any, *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Seconds from cold caches, and the result."""
    drop_caches()
    begin = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - begin, result


def tensors_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    return {name: folder / Path(info.file).name for name, info in open_checkpoint(folder).tensors.items()}


def load(files: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name)


def dequantised_right(fp8: Path, bf16: Path) -> bool:
    """Every tensor of the attention, the shared expert and one routed expert against a float64 product."""
    codes, values = tensors_of(fp8), tensors_of(bf16)
    for name in values:
        if ".experts." in name and ".experts.1." not in name:
            continue
        expected, found = load(codes, name), load(values, name)
        if expected.dtype == torch.float8_e4m3fn:
            rows, columns = expected.shape
            scale = load(codes, f"{name}_scale_inv").double()
            spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            expected = (expected.double() * spread).bfloat16()
        if not torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
            return False
    return True


def codes_came_back(fp8: Path, again: Path) -> bool:
    """FP8 -> BF16 -> FP8 has given every code back, and every scale to BF16's precision."""
    first, second = tensors_of(fp8), tensors_of(again)
    for name in first:
        a, b = load(first, name), load(second, name)
        if name.endswith("_scale_inv"):
            if not torch.allclose(a, b, rtol=2.0**-8, atol=0):
                return False
        elif not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True


def is_right(case: str, source: Path, result: Path, original: Path) -> bool:
    """Whether a conversion's result is what it should be."""
    if case == "bf16":
        return dequantised_right(source, result)
    if case == "fp8":
        return codes_came_back(original, result)
    return compare(source, result).agrees(exact=case != "ue8m0")


def measure(case: str, root: Path, options: argparse.Namespace) -> Row:
    """Convert and copy in turn; what `case` reads is made first where it is missing."""
    source_name, to, settings, target = CASES[case]
    source, result, copied = root / source_name, root / case, root / "copy"
    if not source.exists():
        made_from, made_to, made_with, _ = CASES[source_name]
        convert(root / made_from, source, made_to, workers=options.workers, **made_with)  # type: ignore[arg-type]
    shutil.rmtree(result, ignore_errors=True)
    settings = {**settings, "workers": options.workers, "device": options.device}
    report = convert(source, result, to, **settings)  # type: ignore[arg-type]
    row = Row(case, source_name, report.nbytes, is_right(case, source, result, root / "fp8"), target_ratio=target)
    largest = max(info.nbytes for header in open_checkpoint(source).files.values() for info in header.tensors.values())
    row.rss_bound_bytes = 2 * 10**9 + 2 * largest
    if not row.correct:
        return row
    ours, theirs = [], []
    for _ in range(options.rounds):
        shutil.rmtree(result)
        elapsed, report = timed(convert, source, result, to, **settings)
        ours.append(elapsed)
        theirs.append(timed(plain_copy, result, copied)[0])
        shutil.rmtree(copied)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    row.seconds, row.copy_seconds = statistics.median(ours), statistics.median(theirs)
    row.ratio, row.ratio_lowest, row.ratio_highest = statistics.median(ratios), min(ratios), max(ratios)
    row.gb_per_s = row.written_bytes / row.seconds / 1e9
    row.peak_rss_bytes = report.peak_rss * options.workers
    if case not in {entry[0] for entry in CASES.values()}:
        shutil.rmtree(result)
    return row


def table(rows: list[Row]) -> str:
    """Aligned rows; a wrong one says so and nothing else."""
    lines: list[tuple[str, ...]] = [
        ("conversion", "GB", "s", "cp s", "GB/s", "ratio", "lowest", "highest", "to reach", "RSS MB", "bound MB")
    ]
    for row in rows:
        name = f"{row.source} -> {row.case}"
        if row.ratio is None or row.seconds is None or row.peak_rss_bytes is None or row.rss_bound_bytes is None:
            lines.append((name, "WRONG", *[""] * 9))
            continue
        numbers = (row.seconds, row.copy_seconds, row.gb_per_s, row.ratio, row.ratio_lowest, row.ratio_highest)
        megabytes = (f"{row.peak_rss_bytes / 1e6:.0f}", f"{row.rss_bound_bytes / 1e6:.0f}")
        goal = "" if row.target_ratio is None else f"{row.target_ratio:.1f}"
        lines.append((name, f"{row.written_bytes / 1e9:.2f}", *(f"{n:.2f}" for n in numbers), goal, *megabytes))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=24, help="routed experts of the layer (a multiple of 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where FP8 is encoded and decoded")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="write the JSON line to this file as well")
    options = parser.parse_args()
    where, load_average, cold = machine(), os.getloadavg()[0], drop_caches()
    print(" · ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    print(f"load average {load_average:.2f}, caches {'cold' if cold else 'warm'} before each timing")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-") as folder:
        root = Path(folder)
        config = {**PRESETS["deepseek-v3"], "n_routed_experts": options.experts, "vocab_size": 2048}
        begin = time.perf_counter()
        write_checkpoint(config, root / "fp8", layers=(3,), shards=options.shards)
        print(f"one layer, {options.experts} experts, made in {time.perf_counter() - begin:.0f} s", flush=True)
        rows = []
        for case in options.only:
            rows.append(measure(case, root, options))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print()
    print(table(rows))
    settings = {
        "experts": options.experts,
        "rounds": options.rounds,
        "workers": options.workers,
        "device": options.device,
    }
    result = {
        "benchmark": "convert",
        "machine": where,
        "load_average": round(load_average, 2),
        "cold_caches": cold,
        **settings,
        "rows": [asdict(row) for row in rows],
    }
    line = json.dumps(result)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(line + "\n")
    print(line)
    return 0 if all(row.correct for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
