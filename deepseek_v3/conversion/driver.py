"""`convert`: plan, write the shards in worker processes, then the small files, then config.json and the index."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .config_json import REMOTE_MODULE, remote_code
from .errors import CheckpointError
from .execution import WorkerDied, default_workers, run_all, stopped
from .header import read_json
from .plan import Options, Plan, make_plan
from .plan import Target as Layout
from .reader import CONFIG_NAME, INDEX_NAME, Checkpoint, open_checkpoint, safe_path
from .steps import Job
from .target import Target, check_apart, fingerprint, open_target, storage_error
from .verification import Comparison, compare
from .writer import atomic_file, copy_file, remove_partials, write_all, write_job, write_json

_COMPANIONS = (
    "tokenizer*",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
_TARGETS = ("fp8", "bf16", "fused", "inference")


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        folder: the destination.
        files: safetensors files of the result.
        resumed: how many of them an earlier run had finished.
        nbytes: bytes of all of them.
        seconds: wall time.
        peak_rss: largest resident memory of any one worker, in bytes (0 if every file was there already).
        notes: remarks for the user.
        comparison: the verification, if one was asked for.
        verified: its verdict: exact to the last bit, or to FP8's rounding where BF16 was quantised; None without one.
    """

    folder: Path
    files: int
    resumed: int
    nbytes: int
    seconds: float
    peak_rss: int = 0
    notes: list[str] = field(default_factory=list)
    comparison: Comparison | None = None
    verified: bool | None = None


def convert(
    source: str | Path,
    target: str | Path,
    to: Layout,
    *,
    layout: Literal["auto", "inference"] = "auto",
    scale_fmt: str | None = None,
    model_parallel: int = 1,
    keep_mtp: bool = False,
    shard_bytes: int | None = None,
    like: str | Path | None = None,
    config: str | Path | None = None,
    remote_code: bool = False,
    drop_unknown: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Convert a checkpoint folder into another layout, streaming, from any layout that `open_checkpoint` reads.

    Killed at any moment, the same call continues; the result is byte for byte that of an uninterrupted run.

    Args:
        source: the folder to read; it is never written to.
        target: the folder to write.
        to: "fp8" or "bf16" (the official layouts), "fused" (BF16 with transformers' stacked experts) or "inference"
            (DeepSeek's rank files, in the source's precision).
        layout: "inference" insists on reading rank files.
        scale_fmt: for "fp8": None for float32 scales, "ue8m0" for powers of two.
        model_parallel: for "inference": number of ranks.
        keep_mtp: for "inference": keep the MTP layers, which DeepSeek's own script leaves out.
        shard_bytes: largest output file in bytes; None keeps the source's division where that is possible.
        like: for BF16 to "fp8": an FP8 checkpoint whose codes and scales are kept, bit for bit, for each tensor that
            the source holds unchanged.
        config: config.json for a source that has none.
        remote_code: write an auto_map and the module that it names, for tools that only know trust_remote_code.
        drop_unknown: leave out tensors that the model does not have instead of refusing them.
        workers: processes, None for one a core (at most eight), 0 for this process.
        device: where FP8 is encoded and decoded, "cpu" or "cuda".
        resume: accept a destination that holds this conversion's beginning or its complete result.
        overwrite: replace the checkpoint that the destination holds.
        verify: compare the result with the source afterwards, tensor by tensor.
        progress: called with (file, bytes done, bytes in all) after each file.

    Raises:
        CheckpointError: bad source, options or destination (nothing is left behind), or a full disk (finished files
            stay for the next run).
    """
    began = time.perf_counter()
    source, target = Path(source).resolve(), Path(target)
    options = Options(to, scale_fmt, model_parallel, keep_mtp, shard_bytes, drop_unknown, remote_code)
    _check_options(options)
    _check_device(device)
    check_apart(source, target)
    checkpoint = open_checkpoint(source, layout)
    reference = None
    if like is not None:
        check_apart(Path(like), target, "the checkpoint given as --like")
        reference = open_checkpoint(Path(like).resolve())
    plan = make_plan(checkpoint, options, read_json(Path(config)) if config is not None else None, reference)
    companions = companion_files(source)
    digest = fingerprint(options, plan, [checkpoint, *([reference] if reference else [])])
    with open_target(target, plan, digest, resume=resume, overwrite=overwrite) as held:
        resumed = len(plan.jobs) - len(held.todo)
        peak = _write(held, companions, checkpoint, options, workers, device, progress)
    report = Report(target, len(plan.jobs), resumed, plan.nbytes, 0.0, peak, list(plan.notes))
    if verify:
        without_mtp = to == "inference" and not keep_mtp
        report.comparison = compare(source, target, workers=workers, without_mtp=without_mtp, config=checkpoint.config)
        quantised = any(step.kind == "quantise" for job in plan.jobs for step in job.steps)
        report.verified = report.comparison.agrees(exact=not quantised)
    report.seconds = time.perf_counter() - began
    return report


def _check_options(options: Options) -> None:
    if options.to not in _TARGETS:
        raise CheckpointError(f"there is no layout {options.to!r}", remedy=f"choose one of {', '.join(_TARGETS)}")
    if options.scale_fmt not in (None, "ue8m0"):
        raise CheckpointError(f"there is no scale format {options.scale_fmt!r}", remedy="choose 'ue8m0' or none")
    if options.scale_fmt is not None and options.to != "fp8":
        raise CheckpointError("--scale-fmt is for --to fp8 alone", remedy="leave it out")
    if not 1 <= options.model_parallel <= 999_999 or (options.model_parallel > 1 and options.to != "inference"):
        problem = f"--model-parallel {options.model_parallel} does not fit --to {options.to}"
        raise CheckpointError(problem, remedy="give at least 1, and only with --to inference")
    if options.shard_bytes is not None and (options.shard_bytes < 1 or options.to == "inference"):
        problem = f"a shard size of {options.shard_bytes} bytes does not fit --to {options.to}"
        raise CheckpointError(problem, remedy="give at least 1 byte; the inference layout has one file for each rank")


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise CheckpointError(f"there is no device {device!r}", remedy="choose 'cpu' or 'cuda'")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise CheckpointError("there is no CUDA device", remedy="leave --device out: the CPU gives the same files")


def companion_files(folder: Path) -> list[Path]:
    """Files that belong to a checkpoint beside its weights: tokenizer, generation config, licence.

    Python files come along only if the tokenizer's own configuration names them.
    """
    chosen = {path.name for pattern in _COMPANIONS for path in folder.glob(pattern)}
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        auto_map = read_json(safe_path(folder, tokenizer.name, named_by="the folder")).get("auto_map")
        values = auto_map.values() if isinstance(auto_map, dict) else ()
        named = [name for value in values for name in (value if isinstance(value, list) else [value])]
        chosen |= {f"{name.split('.')[0]}.py" for name in named if isinstance(name, str) and "--" not in name}
    chosen -= {INDEX_NAME, CONFIG_NAME}
    files = [folder / name for name in sorted(chosen) if (folder / name).is_file()]
    return [safe_path(folder, path.name, named_by="the folder") for path in files if path.suffix != ".safetensors"]


def _write(
    held: Target,
    companions: list[Path],
    checkpoint: Checkpoint,
    options: Options,
    workers: int | None,
    device: str,
    progress: Callable[[str, int, int], None] | None,
) -> int:
    """Write all that is left to write; after a failure, leave what a second run can use and nothing else."""
    try:
        peak = _write_shards(held, default_workers() if workers is None else workers, device, progress)
        for path in companions:
            copy_file(path, held.folder / path.name)
        _write_configuration(held.folder, held.plan, options)
        held.finish()
        return peak
    except CheckpointError as error:
        # A worker that died says nothing about the source; what is finished stays for the next run.
        if isinstance(error, WorkerDied):
            remove_partials(held.folder)
        else:
            held.abandon()
        raise
    except OSError as error:
        remove_partials(held.folder)
        if isinstance(error, BrokenPipeError):  # whoever read the progress lines is gone; the disk is fine
            raise
        raise storage_error(error, held.folder) from error
    except BaseException:
        remove_partials(held.folder)
        raise


def _write_one(job: Job, folder: Path, device: str) -> int:
    return write_job(job, folder, device, stopped)


def _write_shards(held: Target, workers: int, device: str, progress: Callable[[str, int, int], None] | None) -> int:
    jobs = held.todo
    done = held.plan.nbytes - sum(job.nbytes for job in jobs)
    needs_codec = any(step.kind != "copy" for job in jobs for step in job.steps)
    peak = 0
    calls = [(job, held.folder, device) for job in jobs]
    for index, rss in run_all(_write_one, calls, workers=workers, needs_codec=needs_codec):
        done, peak = done + jobs[index].nbytes, max(peak, rss)
        if progress is not None:
            progress(jobs[index].file, done, held.plan.nbytes)
    return peak


def _write_configuration(folder: Path, plan: Plan, options: Options) -> None:
    config: dict[str, Any] = dict(plan.config)
    if options.remote_code:
        config["auto_map"], module = remote_code(config)
        with atomic_file(folder / f"{REMOTE_MODULE}.py") as fd:
            write_all(fd, module.encode(), 0)
    write_json(folder / CONFIG_NAME, config)
    if plan.index is not None:
        write_json(folder / INDEX_NAME, plan.index)
