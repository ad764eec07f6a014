"""Where a kernel test runs: one with a `target` argument runs on the reference, in the interpreter, on the GPU.

Triton's interpreter is chosen when triton is imported, so it gets a process of its own (test_kernels_interpreter.py),
in which only the tests with a target are left. There float16 stands for bfloat16, whose products it gets wrong.
"""

import os
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Target:
    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def use_torchs_fp8_casts():
    """Triton's interpreter loses carries and NaN when it casts to E4M3; torch's cast is the hardware's."""
    import numpy as np
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(array, source, target, rounding_mode):
        if "fp8e4nv" not in (source.name, target.name):
            return original(array, source, target, rounding_mode)
        dense = np.ascontiguousarray(array)
        if target.name == "fp8e4nv":
            codes = torch.from_numpy(dense).clamp(-448, 448).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8).numpy().reshape(array.shape)
        width = {"fp32": torch.float32, "fp16": torch.float16}[target.name]
        wide = torch.from_numpy(dense.view(np.uint8)).view(torch.float8_e4m3fn).to(width).numpy()
        return wide.view(f"uint{target.primitive_bitwidth}").reshape(array.shape)

    interpreter._convert_float = convert


def fuse_multiply_add():
    """Triton's interpreter rounds the product of a fused multiply-add; in float64 it is exact."""
    import numpy as np
    from triton.runtime import interpreter

    def fma(builder, x, y, z):
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


if INTERPRETING:
    use_torchs_fp8_casts()
    fuse_multiply_add()


def pytest_generate_tests(metafunc):
    if "target" not in metafunc.fixturenames:
        return
    if INTERPRETING:
        targets = [Target("triton", "cpu", torch.float16)]
    else:
        gpu = [Target("triton", "cuda", dtype) for dtype in (torch.bfloat16, torch.float16)]
        targets = [Target("torch", "cpu", torch.float32), Target("torch", "cpu", torch.bfloat16)]
        targets += [pytest.param(target, marks=pytest.mark.gpu) for target in gpu]
    metafunc.parametrize("target", targets, ids=lambda target: str(target))


def pytest_collection_modifyitems(config, items):
    if INTERPRETING:
        gone = [item for item in items if "target" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty hands out NaN: an element that nobody writes cannot pass for a right one."""
    real = torch.empty
    # torch looks up once a process which functions `torch.device` as a context reaches; it must not meet this one.
    with torch.device("meta"):
        assert real(1).is_meta

    def poisoned(*args, **kwargs):
        tensor = real(*args, **kwargs)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(1 << 30)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh random inputs for each test, the same on each run."""
    import zlib

    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
