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
        hooks = knobs.runtime
        watched = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        if watched or not isinstance(self.kernel, JITFunction):
            self.kernel[grid](*tensors, *numbers, *changing, **constants)
            return
        active = driver.active
        device = active.get_current_device()
        kinds = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
        key = (device, numbers, *constants.values(), *kinds)
        found = self._found.get(key)
        if found is None:
            compiled = self.kernel[grid](*tensors, *numbers, *changing, **constants)
            if len(self._found) < MOST:
                blanks = (None,) * (len(self.kernel.params) - len(tensors) - len(numbers) - len(changing))
                self._found[key] = compiled.run, compiled.function, compiled.packed_metadata, blanks
            return
        run, function, packed, blanks = found
        stream = active.get_current_stream(device)
        run(*grid, stream, function, packed, None, None, None, *tensors, *numbers, *changing, *blanks)
