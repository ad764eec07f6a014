"""Which back end serves an operation: one rule for all, asked when an operation runs and never at import.

An operation lists its back ends, best first, each with the reason why it cannot run here (None: it can).
``backend="auto"`` takes the first that can; the environment variable DEEPSEEK_V3_KERNELS narrows that choice
("torch" for everything, or "mla_decode=torch,fp8_gemm=triton"). A back end asked for by name, by argument or by
the variable, that cannot run is an error with the reason.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import library

logger = logging.getLogger(__name__)

ENVIRONMENT = "DEEPSEEK_V3_KERNELS"
Reasons = dict[str, str | None]

# Operation -> the back ends and their reasons on a device; filled by the modules that define the operations.
OPERATIONS: dict[str, Callable[[torch.device], Reasons]] = {}

# One library for every launch, so that torch.compile and CUDA graphs see each as one node.
LIBRARY = library.Library("deepseek_v3", "DEF")


# What an operation's arguments are where nothing looks on: no fake, sharded or wrapped tensor, no symbolic size.
_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str}

# The operations by name. A call of one costs the host a tenth of a call through ``torch.ops``.
ops = SimpleNamespace()


def guarded(function: Callable) -> Callable:
    """``function`` with its first tensor's GPU as the current one: Triton launches on the current device, whatever the
    tensors', and a model spread over several GPUs calls from one thread."""

    @functools.wraps(function)
    def run(*arguments):
        first = arguments[0]
        if not isinstance(first, torch.Tensor):
            first = next(x for x in arguments if isinstance(x, torch.Tensor))
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return run


def unwatched(arguments: tuple) -> bool:
    """Whether an operation may run without torch's dispatcher: no compiler, mode, transform or gradient looks on."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and _PLAIN.issuperset(map(type, arguments))
    )


def define(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as ``torch.ops.deepseek_v3.<name>`` with ``fake`` for shapes alone, and as
    ``ops.<name>``, which goes to it without the dispatcher where nobody could tell the difference."""

    def register(function: Callable) -> Callable:
        name = LIBRARY.define(schema)
        run = guarded(function)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        library.register_fake(f"deepseek_v3::{name}", fake, lib=LIBRARY)
        dispatched = getattr(torch.ops.deepseek_v3, name).default
        setattr(ops, name, lambda *arguments: (run if unwatched(arguments) else dispatched)(*arguments))
        return function

    return register


@functools.cache
def installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def processors(index: int | None) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(torch.device("cuda", index or 0)).multi_processor_count


def interpreting() -> bool:
    """Whether Triton's interpreter is on: kernels then run on CPU tensors, for tests alone."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_reason(device: torch.device, least: tuple[int, int] = (8, 0)) -> str | None:
    """Why Triton kernels cannot run on ``device``; None where they can."""
    if not installed("triton"):
        return "triton is not installed"
    if device.type == "cpu" and interpreting():
        return None
    return cuda_reason(device, least)


def cuda_reason(device: torch.device, least: tuple[int, int]) -> str | None:
    """Why ``device`` is no NVIDIA GPU of compute capability ``least`` or newer; None where it is one."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.cuda is None:
        return "the GPU is not NVIDIA's"
    if capability(device.index) < least:
        have = capability(device.index)
        return f"needs compute capability {least[0]}.{least[1]}, the GPU has {have[0]}.{have[1]}"
    return None


def requested(operation: str, backend: str) -> tuple[str, str]:
    """The back end asked for and by whom; the argument wins over the environment."""
    if backend != "auto":
        return backend, "argument"
    narrowed = os.environ.get(ENVIRONMENT)
    if not narrowed:
        return "auto", ""
    for entry in narrowed.split(","):
        name, _, value = entry.strip().rpartition("=")
        if value and name in ("", operation):
            return value, ENVIRONMENT
    return "auto", ""


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def choose(operation: str, reasons: Reasons, backend: str, device: torch.device) -> str:
    """Name of the back end to run.

    Raises:
        ValueError: a back end that the operation does not have.
        RuntimeError: a back end asked for that cannot run, with the reason.
    """
    wanted, source = requested(operation, backend)
    if wanted == "auto":
        chosen = next(name for name, reason in reasons.items() if reason is None)
        if chosen == "torch" and device.type == "cuda":
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            _say_once(f"{operation} runs on plain torch on this GPU ({why})")
        return chosen
    if wanted not in reasons:
        raise ValueError(f"{operation} has no back end {wanted!r} ({source}); choose from auto, {', '.join(reasons)}")
    if reasons[wanted] is not None:
        raise RuntimeError(f"{operation} cannot run on {wanted!r} ({source}): {reasons[wanted]}")
    return wanted


@dataclass(frozen=True)
class BackendRow:
    """One operation: the back ends that can run, the one that ``auto`` takes, and why the better ones are out."""

    operation: str
    available: tuple[str, ...]
    chosen: str
    why: str


class BackendTable(list[BackendRow]):
    """Rows of ``backends()``; its text is an aligned table."""

    def __str__(self) -> str:
        lines = [("operation", "available", "chosen", "why")]
        lines += [(row.operation, ", ".join(row.available), row.chosen, row.why) for row in self]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in lines
        )


def _row(operation: str, reasons: Reasons) -> BackendRow:
    available = tuple(name for name, reason in reasons.items() if reason is None)
    wanted, source = requested(operation, "auto")
    if wanted != "auto":
        problem = reasons.get(wanted, "no such back end")
        return BackendRow(
            operation, available, wanted, f"set by {source}" + (f", fails: {problem}" if problem else "")
        )
    chosen = available[0]
    out = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    return BackendRow(operation, available, chosen, "; ".join(out) if out else "first choice")


def backends(device: torch.device | str | None = None) -> BackendTable:
    """Every operation with its back ends, the one that ``auto`` takes on ``device``, and why.

    Args:
        device: where the tensors would be; the current CUDA device if there is one, else the CPU.

    Returns:
        A list of ``BackendRow``; ``print`` shows it as a table. Shapes can rule out a back end further.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return BackendTable(_row(name, probe(device)) for name, probe in OPERATIONS.items())
