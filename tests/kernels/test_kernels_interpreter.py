"""The Triton kernels on the CPU: the tests with a target, once more, in a process with Triton's interpreter on."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
FILES = sorted(
    path.name
    for path in HERE.glob("test_kernels_*.py")
    if path.name != pathlib.Path(__file__).name and re.search(r"\(target\b", path.read_text())
)


@pytest.mark.parametrize("file", FILES)
def test_kernels_agree_in_the_interpreter(file):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout
