"""Checkpoints of DeepSeek-V3 class: read safely, converted between every layout, compared and inspected.

Importing this is cheap: neither torch nor transformers is loaded before FP8 has to be encoded or decoded.
"""

from typing import Any

from .errors import CheckpointError

_HOMES = {
    "Checkpoint": "reader",
    "Comparison": "verification",
    "Inspection": "inspection",
    "Report": "driver",
    "compare": "verification",
    "convert": "driver",
    "inspect": "inspection",
    "open_checkpoint": "reader",
    "write_checkpoint": "generator",
}

__all__ = ["CheckpointError", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
