"""Tile shapes chosen by measuring, where the user allows it.

Each Triton kernel has a tiling for its sizes that needs no measurement, so that a first call does not take a minute.
`autotune()` lets the first call with new sizes time the kernel's list for the card's architecture instead, and can
keep what it found in a file. Sums may be formed in another order then: results agree to rounding, not bit for bit.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

ENVIRONMENT = "DEEPSEEK_V3_AUTOTUNE"
FORMAT = "deepseek_v3 tilings 1"


def bucket(rows: int) -> int:
    """The least power of two from ``rows`` up: sizes that vary from call to call are tuned once an octave."""
    return 1 << max(0, rows - 1).bit_length()


def _word(value: Any) -> str:
    """A size as it stands in the file: 256x4096x7168, bfloat16, 1024, True."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def _read(path: Path) -> dict[str, dict[str, dict]]:
    """Tilings by card and by kernel and sizes; none where there is no file yet."""
    try:
        held = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no file of tilings can be read here ({error}); delete it or name another") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("cards"), dict):
        raise ValueError(f"{path}: is no file of tilings ({FORMAT!r}); name another, or delete it if it is an old one")
    return held["cards"]


def _write(path: Path, cards: dict[str, dict[str, dict]]) -> None:
    """Replace the file at once, with what other processes have found since it was read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = _read(path)
    for card, found in cards.items():
        merged[card] = merged.get(card, {}) | found
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"format": FORMAT, "cards": merged}, file, indent=1, sort_keys=True)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _card(device: torch.device) -> str:
    """What a measured time depends on beside the sizes."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}"


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of ``run``, caches cold; infinite where the card has no room for it. In the interpreter: of one."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    try:
        if device.type == "cuda":
            return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    except TritonError as error:
        logger.debug("tiling left out: %s", error)
        return float("inf")


class Tuner:
    """What was found so far, in memory and in ``path`` where there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found = {} if path is None else _read(path)
        self._chosen: dict[tuple, Any] = {}

    def choose(
        self,
        kernel: str,
        sizes: dict[str, Any],
        device: torch.device,
        tilings: Sequence[Any],
        run: Callable[[Any], Any],
    ) -> Any:
        """The fastest of ``tilings``, dataclasses, whose first is the one taken without measuring.

        Args:
            kernel, sizes: what the choice is remembered by, with the card.
            run: launches the kernel with a tiling; called many times, so what it writes may not be needed before.

        While a CUDA graph is captured, nothing can be timed: sizes not met before keep the first.
        """
        short = (kernel, device, *sizes.values())
        chosen = self._chosen.get(short)
        if chosen is None:
            known = self.found.setdefault(_card(device), {})
            key = " ".join([kernel, *(f"{name}={_word(value)}" for name, value in sizes.items())])
            chosen = next((tiling for tiling in tilings if asdict(tiling) == known.get(key)), None)
            if chosen is None:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return tilings[0]
                chosen = self._fastest(key, device, tilings, run)
                known[key] = asdict(chosen)
                self._keep()
            self._chosen[short] = chosen
        return chosen

    def _fastest(self, key: str, device: torch.device, tilings: Sequence[Any], run: Callable[[Any], Any]) -> Any:
        times = [seconds(partial(run, tiling), device) for tiling in tilings]
        best = min(range(len(tilings)), key=times.__getitem__)
        logger.info("%s: %s, %.1f us; %.1f by default", key, tilings[best], 1e6 * times[best], 1e6 * times[0])
        return tilings[best]

    def _keep(self) -> None:
        if self.path is None:
            return
        try:
            _write(self.path, self.found)
        except OSError as error:
            logger.warning("%s: tilings cannot be kept (%s); they last until the process ends", self.path, error)
            self.path = None


_tuner: Tuner | None = None
_asked = False


def active() -> Tuner | None:
    """The tuner, where tuning is on: by `autotune`, else by the environment, which is asked at the first launch."""
    if not _asked:
        wanted = os.environ.get(ENVIRONMENT, "")
        autotune(wanted not in ("", "0"), cache=None if wanted == "1" else wanted)
    return _tuner


def autotune(enabled: bool = True, *, cache: str | os.PathLike[str] | None = None) -> None:
    """Let the Triton kernels of this process choose their tile shapes by measuring.

    The first call of a kernel with new sizes then takes some seconds. The environment variable DEEPSEEK_V3_AUTOTUNE
    does the same without a line of code: ``1``, or the file to keep the choices in.

    Args:
        enabled: False goes back to the fixed tilings.
        cache: a JSON file in which the choices are kept and from which earlier ones are taken, by card and version
            of Triton; it is made where it is missing. None: the choices last as long as the process.

    Raises:
        ValueError: ``cache`` is a file of something else.
    """
    global _tuner, _asked
    _tuner = Tuner(None if cache is None else Path(cache).expanduser()) if enabled else None
    _asked = True
