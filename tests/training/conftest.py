"""What tests of scripts share."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Runs an example as a script, in this process, with its output in `folder`; gives what it said."""

    def script(name, *arguments, folder=tmp_path):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        monkeypatch.setattr(sys, "argv", [name, "--output", str(folder), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script
