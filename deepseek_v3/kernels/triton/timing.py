"""How long a launch takes on the card at hand."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.errors import TritonError
from triton.testing import do_bench

logger = logging.getLogger(__name__)


def card(device: torch.device) -> str:
    """What a measured time depends on beside the sizes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}"


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of ``run``, caches cold; infinite where the card has no room for it. In the interpreter: of one."""
    try:
        if device.type == "cuda":
            return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    except TritonError as error:
        logger.debug("tiling left out: %s", error)
        return float("inf")
