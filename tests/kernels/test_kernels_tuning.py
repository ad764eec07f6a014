"""Tilings chosen by timing: the choice, its file, and that every listed tiling gives the same product."""

import json
import time
from dataclasses import dataclass

import pytest
import torch
from triton.errors import TritonError

from deepseek_v3 import kernels
from deepseek_v3.kernels import tuning

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    rows: int


LISTED = (Shape(3), Shape(1), Shape(2))


class Kernel:
    """Takes longer the more rows its tiling has, and counts its runs."""

    def __init__(self):
        self.runs = []

    def __call__(self, tiling):
        self.runs.append(tiling)
        time.sleep(tiling.rows * 2e-3)


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """Each test begins and ends with what the environment says, and that is nothing."""
    monkeypatch.delenv(tuning.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tuning, "_tuner", None)
    monkeypatch.setattr(tuning, "_asked", False)


def test_the_fastest_is_found_once_for_each_size(tmp_path):
    path = tmp_path / "new" / "tilings.json"
    kernels.autotune(cache=path)
    kernel, tuner = Kernel(), tuning.active()
    assert tuner.choose("k", {"rows": 8}, CPU, LISTED, kernel) == Shape(1)
    timed = len(kernel.runs)
    assert set(kernel.runs) == set(LISTED)
    assert tuner.choose("k", {"rows": 8}, CPU, LISTED, kernel) == Shape(1) and len(kernel.runs) == timed
    tuner.choose("k", {"rows": 16}, CPU, LISTED, kernel)
    tuner.choose("other", {"rows": 8}, CPU, LISTED, kernel)
    assert len(kernel.runs) == 3 * timed

    kernels.autotune(cache=path)
    again = Kernel()
    assert tuning.active().choose("k", {"rows": 8}, CPU, LISTED, again) == Shape(1) and not again.runs
    held = json.loads(path.read_text())
    assert list(held["cards"].values()) == [
        {"k rows=8": {"rows": 1}, "k rows=16": {"rows": 1}, "other rows=8": {"rows": 1}}
    ]


def test_what_the_list_no_longer_has_is_measured_anew(tmp_path):
    path = tmp_path / "tilings.json"
    kernels.autotune(cache=path)
    tuning.active().choose("k", {}, CPU, LISTED, Kernel())
    kernels.autotune(cache=path)
    kernel = Kernel()
    assert tuning.active().choose("k", {}, CPU, (Shape(3), Shape(2)), kernel) == Shape(2) and kernel.runs


def test_a_tiling_that_does_not_fit_is_passed_over():
    kernels.autotune()

    def run(tiling):
        if tiling.rows < 3:
            raise TritonError("out of shared memory")

    assert tuning.active().choose("k", {}, CPU, LISTED, run) == Shape(3)


def test_two_processes_keep_each_others_choices(tmp_path):
    path = tmp_path / "tilings.json"
    first, second = tuning.Tuner(path), tuning.Tuner(path)
    first.choose("a", {}, CPU, LISTED, Kernel())
    second.choose("b", {}, CPU, LISTED, Kernel())
    assert set(tuning.Tuner(path).found[tuning._card(CPU)]) == {"a", "b"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["tilings.json"]


def test_the_environment_turns_it_on_at_the_first_launch(monkeypatch, tmp_path):
    assert tuning.active() is None
    monkeypatch.setattr(tuning, "_asked", False)
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "kept.json"))
    assert tuning.active().path == tmp_path / "kept.json"
    monkeypatch.setattr(tuning, "_asked", False)
    monkeypatch.setenv(tuning.ENVIRONMENT, "1")
    assert tuning.active().path is None
    kernels.autotune(False)
    assert tuning.active() is None


@pytest.mark.parametrize("text", ["no json", "[]", '{"format": "something else", "cards": {}}'])
def test_a_file_of_something_else_is_named_and_left_alone(tmp_path, text):
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="notes.json.*name another"):
        kernels.autotune(cache=path)
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tuner = tuning.Tuner(None)
    tuner.path = tmp_path / "file" / "tilings.json"
    with caplog.at_level("WARNING"):
        assert tuner.choose("k", {}, CPU, LISTED, Kernel()) == Shape(1)
        tuner.choose("l", {}, CPU, LISTED, Kernel())
    assert [record.message.count("cannot be kept") for record in caplog.records] == [1]


class Every(tuning.Tuner):
    """Runs all tilings and keeps what each gave."""

    def __init__(self):
        super().__init__(None)
        self.results = []

    def choose(self, kernel, sizes, device, tilings, run):
        outputs = []
        for tiling in tilings:
            try:
                got = run(tiling)
            except TritonError:
                assert tiling != tilings[0]
                continue
            outputs.append((got[0] if isinstance(got, tuple) else got).clone())
        self.results.append((kernel, outputs))
        return tilings[0]


def operations(device, dtype, backend):
    """Calls of every operation with a list, by the list's name."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 40, 40, 90], dtype=torch.int32, device=device)
    few = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=device)
    x = torch.randn(90, 128, device=device).to(dtype)
    w = torch.randn(3, 256, 128, device=device).to(dtype)
    w[:, 128:] *= 100  # a tile over two scales would show
    dy = torch.randn(90, 128, device=device).to(dtype)
    codes, w_codes = kernels.quantize_activation(x, backend="torch"), kernels.quantize_weight(w, backend="torch")
    turned = [kernels.quantize_grouped_transposed(t, offsets, backend="torch") for t in (dy, x)]
    dense = kernels.quantize_weight(w[0], backend="torch")
    q, q_rope = torch.randn(2, 1, 16, 128, device=device).to(dtype), torch.randn(2, 1, 16, 64, device=device).to(dtype)
    cache, rope = torch.randn(2, 90, 128, device=device).to(dtype), torch.randn(2, 90, 64, device=device).to(dtype)
    on = {"backend": backend}
    return {
        "grouped_rows": lambda: kernels.grouped_gemm(x, w, offsets, **on),
        "grouped_few": lambda: kernels.grouped_gemm(x[:5], w, few, **on),
        "grouped_columns": lambda: kernels.grouped_wgrad(dy, x, offsets, **on),
        "grouped_rows_fp8": lambda: kernels.grouped_fp8_gemm(*codes, *w_codes, offsets, out_dtype=dtype, **on),
        "fp8_grouped_columns": lambda: kernels.grouped_fp8_wgrad(*turned[0], *turned[1], offsets, **on),
        "fp8_matmul": lambda: kernels.fp8_gemm(*codes, *dense, out_dtype=dtype, **on),
        "mla_few": lambda: kernels.mla_decode(q, q_rope, cache, rope, scale=0.1, **on),
    }


def test_every_listed_tiling_gives_the_same_product(target, monkeypatch):
    every = Every()
    monkeypatch.setattr(tuning, "_tuner", every)
    monkeypatch.setattr(tuning, "_asked", True)
    for name, run in operations(target.device, target.dtype, target.backend).items():
        every.results.clear()
        run()
        if target.backend == "torch":
            assert not every.results
            continue
        ((kernel, outputs),) = every.results
        assert kernel == name and len(outputs) > 1
        for other in outputs[1:]:
            difference = (other.double() - outputs[0].double()).norm()
            assert difference < 5e-3 * outputs[0].double().norm(), name
