"""Launches through `Launcher`: which compiled kernel is run with which arguments, when Triton looks again; and when an
operation goes through torch's dispatcher; how a cache's length is split."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deepseek_v3.kernels import dispatch, rms_norm
from deepseek_v3.kernels.triton import launching
from deepseek_v3.kernels.triton.launch_mla import join_tile, splits_for
from deepseek_v3.kernels.triton.tilings import FEW_ROWS, FEW_ROWS_FP8_BY_HAND, MANY_ROWS, MANY_ROWS_BY_HAND


class Compiled:
    """Stands in for a compiled kernel: it notes how it is launched."""

    function, packed_metadata = "function", "packed"

    def __init__(self, log):
        self.run = lambda *arguments: log.append(arguments)


class Kernel(JITFunction):
    """A kernel of two tensors, one number, one that changes, one constant; launched Triton's way it notes that."""

    def __init__(self):
        self.looked, self.launched = [], []
        self.params = [None] * 5

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.looked.append((grid, arguments, constants))
            return Compiled(self.launched)

        return launch


class Device:
    def __init__(self):
        self.device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return f"stream of {device}"


@pytest.fixture
def card(monkeypatch):
    device = Device()
    monkeypatch.setattr(driver, "_active", device)
    return device


def test_a_known_kernel_is_run_with_the_arguments_of_the_call(card):
    kernel = Kernel()
    launch = launching.Launcher(kernel)
    x, y = torch.zeros(16), torch.zeros(16)
    for changing in (100, 101):
        launch((2, 3, 1), (x, None), (7,), (changing,), BLOCK=64, num_warps=4)
        x, y = y, x
    assert len(kernel.looked) == 1
    (seen,) = kernel.launched
    assert seen[:6] == (2, 3, 1, "stream of 0", "function", "packed") and seen[6:9] == (None, None, None)
    assert seen[9] is y and seen[10:] == (None, 7, 101, None)


@pytest.mark.parametrize("what", ["dtype", "alignment", "none", "number", "constant", "option", "device"])
def test_triton_looks_again_where_another_kernel_may_fit(card, what):
    kernel = Kernel()
    launch = launching.Launcher(kernel)
    x = torch.zeros(17)
    tensors, numbers, constants = [x[:16], x], [7], {"BLOCK": 64, "num_warps": 4}
    launch((1, 1, 1), tuple(tensors), tuple(numbers), (5,), **constants)
    if what == "dtype":
        tensors[0] = x[:16].bfloat16()
    elif what == "alignment":
        tensors[0] = x[1:]
    elif what == "none":
        tensors[1] = None
    elif what == "number":
        numbers[0] = 1
    elif what == "device":
        card.device = 1
    else:
        constants["BLOCK" if what == "constant" else "num_warps"] = 8
    launch((1, 1, 1), tuple(tensors), tuple(numbers), (5,), **constants)
    assert len(kernel.looked) == 2 and not kernel.launched


def test_triton_does_it_all_where_something_watches_launches(card):
    kernel = Kernel()
    launch = launching.Launcher(kernel)
    hook = print
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            launch((1, 1, 1), (torch.zeros(1), None), (7,), (5,), BLOCK=64)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(kernel.looked) == 2 and not kernel.launched


def test_numbers_without_end_are_not_kept(card, monkeypatch):
    monkeypatch.setattr(launching, "MOST", 3)
    launch = launching.Launcher(Kernel())
    for number in range(9):
        launch((1, 1, 1), (None, None), (number,), (5,), BLOCK=64)
    assert len(launch._found) == 3


def test_a_bound_launch_hands_over_addresses_and_looks_nothing_up(card):
    kernel = Kernel()
    fixed, x, y = torch.zeros(16), torch.zeros(16), torch.zeros(16)
    bound = launching.Bound(launching.Launcher(kernel), (fixed,), (7,), BLOCK=64)
    bound((2, 3, 1), (x,), (100,))
    card.get_current_device = None  # not asked again
    bound((4, 3, 1), (y,), (101,))
    ((grid, arguments, constants),) = kernel.looked
    assert grid == (2, 3, 1) and arguments[0] is fixed and arguments[1] is x and constants == {"BLOCK": 64}
    (seen,) = kernel.launched
    assert seen[:6] == (4, 3, 1, "stream of 0", "function", "packed") and seen[6:9] == (None, None, None)
    assert seen[9:] == (fixed.data_ptr(), y.data_ptr(), 7, 101, None)


def test_a_bound_launch_without_memory_of_its_own_goes_straight_to_the_driver(card, monkeypatch):
    class Run:
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid = launch_pdl = False
        launch = None

    kernel, seen = Kernel(), []
    Run.launch = staticmethod(lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(Compiled, "__init__", lambda self, log: setattr(self, "run", Run))
    bound = launching.Bound(launching.Launcher(kernel), (None,), (7,), BLOCK=64)
    for _ in range(2):
        bound((1, 1, 1), (None,), (5,))
    head = (1, 1, 1, "stream of 0", "function", False, False, None, None, "packed", None, None, None)
    assert seen == [(*head, None, None, 7, 5, None)]


def test_a_bound_launch_trusts_no_tensor_at_an_odd_address(card):
    kernel = Kernel()
    x = torch.zeros(17)
    bound = launching.Bound(launching.Launcher(kernel), (x[:16],), (7,), BLOCK=64)
    bound((1, 1, 1), (x[1:],), (5,), False)
    bound((1, 1, 1), (x[:16],), (5,))
    assert len(kernel.looked) == 2
    bound((1, 1, 1), (x[1:],), (5,), False)
    bound((1, 1, 1), (x[:16],), (5,))
    assert len(kernel.looked) == 2 and kernel.launched[0][10] is not None
    assert kernel.launched[0][10].data_ptr() == x[1:].data_ptr() and kernel.launched[1][10] == x.data_ptr()
    with_hook = knobs.runtime.launch_enter_hook
    with_hook.add(print)
    try:
        bound((1, 1, 1), (x[:16],), (5,))
    finally:
        with_hook.remove(print)
    assert len(kernel.looked) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1024, 1025])
def test_sizes(size):
    assert launching.next_power_of_2(size) == min(2**i for i in range(12) if 2**i >= size)
    assert launching.cdiv(size, 16) == len(range(0, size, 16))


def test_the_dispatcher_is_passed_by_only_where_nothing_looks_on():
    x, weight = torch.randn(2, 8), torch.nn.Parameter(torch.ones(8))
    assert not dispatch.unwatched((x, weight, 1.0, None, "auto"))  # a gradient may be wanted
    with torch.no_grad():
        assert dispatch.unwatched((x, weight, 1.0, None, "auto"))
        with FakeTensorMode() as mode:
            assert not dispatch.unwatched((x, weight))
            fake = mode.from_tensor(x)
        assert not dispatch.unwatched((fake, weight))
        assert rms_norm(fake, mode.from_tensor(weight)).shape == x.shape
        assert torch.allclose(torch.vmap(lambda row: row * dispatch.unwatched((row,)))(x), torch.zeros(2, 8))


@pytest.mark.parametrize("rank", [32, 64, 256, 512])
def test_the_splits_that_one_program_joins_fit_its_registers(rank):
    """Up to the splits that two programs on each of 148 multiprocessors make; 64 numbers a thread do not spill."""
    for splits in range(2, 297):
        cols, warps = join_tile(splits, rank)
        assert rank % cols == 0 and 1 << (splits - 1).bit_length() <= 64 * warps * 32 // cols


@pytest.mark.parametrize("tiling", [FEW_ROWS, MANY_ROWS, MANY_ROWS_BY_HAND, FEW_ROWS_FP8_BY_HAND], ids=str)
def test_room_to_spare_moves_no_border_between_splits(tiling):
    """A replayed step gives the kernel a cache's whole storage, a launched one what is cached: the same sums."""

    def tiles_of_a_split(programs, slots, cached):
        splits, tiles = splits_for(programs, slots, tiling, 132), math.ceil(cached / tiling.slots)
        return max(math.ceil(tiles / splits), tiling.least * (2 if tiles > tiling.long else 1))

    for programs in (1, 2, 32, 128, 500):
        for cached in (1, 64, 1025, 3000, 8192, 8193, 131073):
            exact = tiles_of_a_split(programs, cached, cached)
            for room in (64, cached // 2, 2 * cached, 4 * cached):
                assert tiles_of_a_split(programs, cached + room, cached) == exact
