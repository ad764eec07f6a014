"""What an import of the kernels may do: torch alone, and no question to the device or the environment."""

import ast
import pathlib
import subprocess
import sys

import pytest
import torch

from deepseek_v3.kernels import dispatch

FOLDER = pathlib.Path(__file__).parents[2] / "deepseek_v3" / "kernels"
SCRIPT = """
import os, sys, types
import torch

# None in the module table is how Python remembers that a module is not there.
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
for name in ("triton", "transformers", "flash_mla", "deep_gemm"):
    sys.modules[name] = None

def forbidden(*arguments, **options):
    raise AssertionError("asked at import")

for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, forbidden)

class Environment(dict):
    get = __getitem__ = __contains__ = forbidden

# The package's own __init__ brings in the models: only the kernels are asked here.
package = types.ModuleType("deepseek_v3")
package.__path__ = [sys.argv[1]]
sys.modules["deepseek_v3"] = package
real, os.environ = os.environ, Environment()
from deepseek_v3 import kernels
os.environ = real
codes, scale = kernels.quantize_weight(torch.randn(130, 130))
assert kernels.dequantize_weight(codes, scale).shape == (130, 130)
row = kernels.backends("cpu")[0]
assert row.chosen == "torch", row
print("fine")
"""


def test_import_without_triton_asks_nothing():
    command = [sys.executable, "-c", SCRIPT, str(FOLDER.parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout == "fine\n", run.stderr[-3000:]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_and_themselves_alone(path):
    allowed = {"torch", "deep_gemm", "flash_mla"} | set(sys.stdlib_module_names)
    if path.parent.name == "triton":
        allowed.add("triton")
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import of more than two levels would leave this folder.
            inside = 2 if path.parent != FOLDER else 1
            assert node.level <= inside, f"{path.name} imports from above the kernels"
            names = [node.module] if node.level == 0 and node.module else []
        assert {name.split(".")[0] for name in names} <= allowed, f"{path.name} imports {names}"


def test_an_operation_runs_on_its_tensors_gpu(monkeypatch):
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    seen = dispatch.guarded(lambda number, tensor: (number, current[-1]))
    assert seen(5, torch.ones(1).as_subclass(Elsewhere)) == (5, 1) and current == [0]
    assert seen(5, torch.ones(1)) == (5, 0)
