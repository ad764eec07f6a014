"""What every benchmark shares: the machine line, versions, alternating timing, the table, the JSON line."""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Where this runs: processor, cores in use, accelerator, versions, date."""
    import transformers

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def alternate(functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns so that a drift of the machine meets all of them."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of the pairwise ratios slow / fast."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--output FILE` for the JSON."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--output", help="also write the JSON there")
    return result


def finish(
    benchmark: str, columns: list[str], rows: list[list[Any]], data: dict[str, Any], output: str | None
) -> None:
    """Print machine line, aligned table and one JSON line; write the JSON where asked."""
    record = {"benchmark": benchmark, "machine": machine(), **data}
    print(" · ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None))
    table = [columns, *[[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    line = json.dumps(record)
    if output:
        Path(output).write_text(json.dumps(record, indent=1) + "\n")
    print(line)
