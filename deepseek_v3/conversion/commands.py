"""The subcommands `convert`, `verify` and `inspect`; each imports what it needs when it runs."""

import argparse
import gc
import json
import re
from typing import Any

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_EXIT_CODES = "Exit code: 0 if all is well, 1 if the check fails, 2 for bad input."


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})\s*([KMGT]?)B?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2]]


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def add_commands(subparsers: Any) -> None:
    """Add the three subcommands; each sets `func(args) -> int`, the exit code, which raises for bad input.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returns.
    """
    _add_convert(subparsers)
    _add_verify(subparsers)
    _add_inspect(subparsers)


def _add_convert(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint between FP8, BF16, fused and inference layouts",
        description="Convert a checkpoint folder, tensor by tensor, on the CPU alone and in little memory. The source "
        "is never written to. A killed conversion continues when the same command is given again.",
        epilog=_EXIT_CODES,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="folder to read: FP8, BF16, fused or DeepSeek's model{i}-mp{N}.safetensors")
    add("target", metavar="DST", help="folder to write: new, empty, or with --resume or --overwrite")
    add(
        "--to",
        required=True,
        choices=("fp8", "bf16", "fused", "inference"),
        help="fp8, bf16: the official layouts; fused: BF16 with transformers' stacked experts; inference: DeepSeek's "
        "rank files, in the precision of SRC",
    )
    add(
        "--from",
        dest="layout",
        choices=("auto", "inference"),
        default="auto",
        help="inference: read SRC's rank files even if other safetensors lie there (default: whatever is found)",
    )
    add(
        "--scale-fmt",
        choices=("float32", "ue8m0"),
        default=None,
        help="scales of --to fp8: float32 (default) or powers of two; scales that are none are never rounded to it",
    )
    add("--model-parallel", type=_count, default=1, metavar="N", help="number of ranks for --to inference (default 1)")
    add("--keep-mtp", action="store_true", help="keep the MTP layers in --to inference (DeepSeek's script drops them)")
    add(
        "--like",
        metavar="DIR",
        help="for BF16 to FP8: an FP8 checkpoint whose codes and scales are kept bit for bit "
        "for every tensor that SRC holds unchanged",
    )
    add("--config", metavar="FILE", help="config.json for a SRC that has none")
    add("--shard-size", type=_size, metavar="SIZE", help="largest output file, e.g. 5GB (default: divided as SRC is)")
    add("--workers", type=_count, metavar="N", help="worker processes (default: one a core, at most 8)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where FP8 is encoded and decoded (default cpu)")
    add("--resume", action="store_true", help="accept a DST that holds this conversion's beginning or result")
    add("--overwrite", action="store_true", help="replace the checkpoint in DST")
    add("--drop-unknown", action="store_true", help="leave out tensors that the model does not have")
    add(
        "--remote-code",
        action="store_true",
        help="add an auto_map and a two-line module for tools that only know "
        "trust_remote_code; needs this package where it is loaded",
    )
    add("--verify", action="store_true", help="compare DST with SRC afterwards")
    add("--quiet", action="store_true", help="no line for each finished file")
    parser.set_defaults(func=_convert)


def _add_verify(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="compare two checkpoints of any layout tensor by tensor",
        description="Compare names, shapes, dtypes and values; FP8 is compared after dequantisation.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("a", metavar="A", help="a checkpoint folder")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--exact", action="store_true", help="FP8's rounding counts as a difference, too")
    parser.add_argument("--checksums", action="store_true", help="list every tensor: outcome, checksums of its values")
    parser.add_argument("--without-mtp", action="store_true", help="leave the MTP layers out")
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="worker processes (default: one a core, at most 8)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_verify)


def _add_inspect(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="say what a checkpoint folder holds and what it needs",
        description="Read the headers alone: layout, model, parameters by part, dtypes, bytes, MTP, missing or wrong "
        "tensors, memory needed for each precision.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("folder", metavar="DIR", help="a checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=_inspect)


def _convert(args: argparse.Namespace) -> int:
    from .driver import convert
    from .report import readable

    def show(file: str, done: int, total: int) -> None:
        print(f"{file}  {readable(done)} of {readable(total)}", flush=True)

    report = convert(
        args.source,
        args.target,
        args.to,
        layout=args.layout,
        scale_fmt=None if args.scale_fmt == "float32" else args.scale_fmt,
        model_parallel=args.model_parallel,
        keep_mtp=args.keep_mtp,
        shard_bytes=args.shard_size,
        like=args.like,
        config=args.config,
        remote_code=args.remote_code,
        drop_unknown=args.drop_unknown,
        workers=args.workers,
        device=args.device,
        resume=args.resume,
        overwrite=args.overwrite,
        verify=args.verify,
        progress=None if args.quiet else show,
    )
    for note in report.notes:
        print(f"note: {note}")
    resumed = f", {report.resumed} of them from an earlier run" if report.resumed else ""
    speed = f"{readable(report.nbytes)} in {report.seconds:.1f} s"
    print(f"wrote {report.files} files{resumed}, {speed}, to {report.folder}")
    if report.comparison is None:
        return 0
    print(report.comparison.table())
    print("verified" if report.verified else "the result differs from its source")
    return 0 if report.verified else 1


def _verify(args: argparse.Namespace) -> int:
    from .verification import compare

    result = compare(args.a, args.b, workers=args.workers, without_mtp=args.without_mtp, checksums=args.checksums)
    agrees = result.agrees(exact=args.exact)
    if args.json:
        print(json.dumps(result.as_dict()))
    else:
        print(result.table())
        print("agree" if agrees else "do not agree")
    return 0 if agrees else 1


def _inspect(args: argparse.Namespace) -> int:
    from .inspection import inspect

    # A million small objects and no cycles: looking for some takes a sixth of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        result = inspect(args.folder)
    finally:
        if collecting:
            gc.enable()
    print(json.dumps(result.as_dict()) if args.json else result.text())
    return 0 if result.sound else 1
