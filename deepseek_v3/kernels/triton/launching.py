"""Launches that cost the host little.

Triton looks at every argument of every launch to find which compiled kernel fits it, which takes longer than the
launch. With few tokens a step is bound by that. Here a kernel is found by what the look would depend on: numbers by
their value, tensors by dtype and alignment.
"""

from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`. Triton's own function costs the host more than a launch."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two from `size` up. Triton's own function costs the host more than a launch."""
    return 1 << (size - 1).bit_length()


# A caller whose numbers never repeat falls back to Triton's own way beyond so many.
MOST = 1024


class Launcher:
    """A kernel whose parameters are tensors, numbers, numbers that change from call to call, and constants, in order.

    kernel: what `triton.jit` made; in Triton's interpreter it is run as it is. The numbers that change must be named
    in its `do_not_specialize`.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._found: dict[tuple, tuple] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[float, ...] = (),
        changing: tuple[int, ...] = (),
        **constants: Any,
    ) -> None:
        """Launch over `grid`; `constants` holds the constexpr parameters in order, then Triton's options."""
        if self.watched():
            self.kernel[grid](*tensors, *numbers, *changing, **constants)
            return
        self._launch(grid, tensors, numbers, changing, constants)

    def watched(self) -> bool:
        """Whether Triton must make the launches, for whoever looks on, or in its interpreter."""
        hooks = knobs.runtime
        return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls) or not isinstance(
            self.kernel, JITFunction
        )

    def _launch(self, grid: tuple, tensors: tuple, numbers: tuple, changing: tuple, constants: dict) -> tuple | None:
        """Launch, and return what was found for these arguments, if it is known by now."""
        active = driver.active
        device = active.get_current_device()
        kinds = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
        key = (device, numbers, *constants.values(), *kinds)
        found = self._found.get(key)
        if found is None:
            compiled = self.kernel[grid](*tensors, *numbers, *changing, **constants)
            if len(self._found) >= MOST:
                return None
            blanks = (None,) * (len(self.kernel.params) - len(tensors) - len(numbers) - len(changing))
            self._found[key] = compiled.run, compiled.function, compiled.packed_metadata, blanks
            return self._found[key]
        run, function, packed, blanks = found
        stream = active.get_current_stream(device)
        run(*grid, stream, function, packed, None, None, None, *tensors, *numbers, *changing, *blanks)
        return found


class Bound:
    """A launch with fixed numbers and constants on one device: nothing is looked up from the second time on.

    `sure` says that each tensor has the dtype that it had in the first call, and like then an address of whole 16
    bytes.
    """

    def __init__(self, launcher: Launcher, numbers: tuple[float, ...] = (), **constants: Any) -> None:
        self._launcher, self._numbers, self._constants = launcher, numbers, constants
        self._found: tuple | None = None

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor | None, ...],
        changing: tuple[int, ...] = (),
        sure: bool = True,
    ) -> None:
        """Launch over `grid`; `changing` as of a `Launcher`."""
        launcher, found = self._launcher, self._found
        if launcher.watched():
            launcher.kernel[grid](*tensors, *self._numbers, *changing, **self._constants)
        elif found is None or not sure:
            known = launcher._launch(grid, tensors, self._numbers, changing, self._constants)
            self._found = known if sure else found
        else:
            run, function, packed, blanks = found
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            run(*grid, stream, function, packed, None, None, None, *tensors, *self._numbers, *changing, *blanks)
