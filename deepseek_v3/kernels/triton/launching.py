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
    """A launch of which some tensors, the numbers, the constants and the GPU stay the same: from the second time on
    nothing is looked up, and addresses go to the driver instead of tensors.

    launcher: of the kernel, whose first tensors are `fixed`; they must stay where they are.
    """

    def __init__(
        self,
        launcher: Launcher,
        fixed: tuple[torch.Tensor | None, ...] = (),
        numbers: tuple[float, ...] = (),
        **constants: Any,
    ) -> None:
        self._launcher, self._fixed, self._numbers, self._constants = launcher, fixed, numbers, constants
        self._addresses = tuple(None if x is None else x.data_ptr() for x in fixed)
        self._run: Any = None
        self._before: tuple[Any, ...] = ()

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor | None, ...],
        changing: tuple[int, ...] = (),
        sure: bool = True,
    ) -> None:
        """Launch over `grid`; `changing` as of a `Launcher`.

        sure: each tensor has the dtype that it had in the first such call, and an address of whole 16 bytes.
        """
        launcher, run = self._launcher, self._run
        if run is None or not sure or launcher.watched():
            every = (*self._fixed, *tensors)
            if launcher.watched():
                launcher.kernel[grid](*every, *self._numbers, *changing, **self._constants)
                return
            found = launcher._launch(grid, every, self._numbers, changing, self._constants)
            if sure and found is not None:
                self._bind(*found)
            return
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        stream = self._stream(self._device)
        run(*grid, stream, *self._before, *self._addresses, *addresses, *self._numbers, *changing, *self._blanks)

    def _bind(self, run: Any, function: Any, packed: Any, blanks: tuple) -> None:
        active = driver.active
        self._device, self._stream, self._blanks = active.get_current_device(), active.get_current_stream, blanks
        # Triton's own launcher finds memory for kernels that need some of their own, then calls this.
        direct = getattr(run, "launch", None)
        if direct is not None and run.global_scratch_size == 0 and run.profile_scratch_size == 0:
            options = (run.launch_cooperative_grid, run.launch_pdl, None, None)
            self._run, self._before = direct, (function, *options, packed, None, None, None)
        else:
            self._run, self._before = run, (function, packed, None, None, None)
