"""The Triton kernels on the CPU: the tests with a target, once more, in a process with Triton's interpreter on."""

import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def test_kernels_agree_in_the_interpreter():
    """All files in one process: what an import costs is paid once."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(HERE)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-9000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout
