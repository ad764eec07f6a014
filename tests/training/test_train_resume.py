"""Runs that are killed, at any moment, and go on: every logged number and the weights as if they had not been."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from children import start

from deepseek_v3.cli import main
from deepseek_v3.training.checkpoints import newest_checkpoint

COMMON = ["--model", "tiny", "--vocab-size", "300", "--block", "32", "--batch", "2", "--held-out", "0.2", "--steps"]
COMMON += ["12", "--save-steps", "2", "--log-steps", "3", "--warmup", "3"]
SMALL = ["num_hidden_layers=2", "attention_dropout=0.1"]  # so that the random state matters
RUNS = {
    "fp32": ["--data", "{text}", "--accumulation", "2", "--eval-steps", "5", "--eval-bytes", "500"],
    "bf16, streamed": ["--data", "{rows}", "--stream", "--shuffle-buffer", "7", "--mask-documents", "--accumulation"]
    + ["2", "--precision", "bf16", "--eval-steps", "4", "--eval-bytes", "500"],
    "fp8, streamed": ["--data", "{rows}", "--stream", "--shuffle-buffer", "5", "--precision", "fp8", "--optimizer"]
    + ["adamw-bf16", "--fp8-statistics", "5", "--schedule", "report", "--batch-ramp", "2", "5", "20"]
    + ["--mask-documents", "--activation-checkpointing", "--eval-steps", "5", "--eval-bytes", "500"],
}


def dying(path, line):
    """The command in a process that dies with half of the file at `path` on the disk."""
    save = torch.save

    def half(value, file, *rest, **named):
        save(value, file, *rest, **named)
        if str(file).endswith(path):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    main(line)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"def function_{i}(argument):\n    return argument * {i}\n" * (1 + i % 5) for i in range(40)]
    (folder / "text").mkdir()
    (folder / "rows").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i}.py").write_text(text)
    for part in range(2):
        rows = "\n".join(json.dumps({"text": text}) for text in texts[20 * part : 20 * part + 20])
        (folder / "rows" / f"{part}.jsonl").write_text(rows)
    return {"text": str(folder / "text"), "rows": str(folder / "rows")}


def command(name, data, output):
    options = [option.format(**data) for option in RUNS[name]]
    return ["train", "--output", str(output), *COMMON, *options, "--set", *SMALL]


def logged(folder):
    """All entries but the last, which is of seconds."""
    history = json.loads((folder / "training_log.json").read_text())
    return [entry for entry in history if "train_runtime" not in entry]


@pytest.fixture(scope="module")
def whole(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(command(request.param, data, folder)) == 0
    return request.param, folder


def assert_same(folder, whole):
    assert logged(folder) == logged(whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("whole", ["fp32", "fp8, streamed"], indirect=True)
def test_a_run_that_is_killed_goes_on_exactly(whole, data, tmp_path):
    """Killed as soon as a checkpoint's folder is seen, in whatever state that and the run are."""
    name, folder = whole
    line = command(name, data, tmp_path)
    child = start(main, line)
    end = time.monotonic() + 120
    while not (tmp_path / "checkpoint-4").is_dir() and child.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "training_log.json").exists()
    assert main([*line, "--resume"]) == 0
    assert_same(tmp_path, folder)
    steps = [entry["step"] for entry in logged(folder) if "loss" in entry]
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12]  # each third, and each checkpoint
    assert len({entry["loss"] for entry in logged(folder) if "loss" in entry}) == 8


@pytest.mark.parametrize("whole", ["bf16, streamed"], indirect=True)
def test_a_half_written_checkpoint_is_passed_over(whole, data, tmp_path, capsys):
    name, folder = whole
    line = command(name, data, tmp_path)
    child = start(dying, "checkpoint-6/optimizer.pt", line)
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-6" / "optimizer.pt").is_file()
    capsys.readouterr()
    assert main([*line, "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/checkpoint-6 is half written (no trainer_state.json): passed over" in said
    assert f"resuming from {tmp_path}/checkpoint-4" in said
    assert_same(tmp_path, folder)


@pytest.mark.parametrize("whole", ["fp8, streamed"], indirect=True)
def test_a_run_killed_before_its_first_checkpoint_or_after_its_last(whole, data, tmp_path, capsys):
    name, folder = whole
    line = [*command(name, data, tmp_path), "--resume"]
    shutil.copy(folder / "train_config.json", tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    assert main(line) == 0
    assert "has no complete checkpoint: beginning again" in capsys.readouterr().out
    assert_same(tmp_path, folder)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "training_log.json").unlink()
    assert main(line) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert_same(tmp_path, folder)


@pytest.mark.parametrize("whole", ["fp32"], indirect=True)
def test_which_checkpoint_is_complete(whole, tmp_path, capsys):
    """Whatever Trainer had not written yet."""
    shutil.copytree(whole[1] / "checkpoint-10", tmp_path / "checkpoint-10")
    made = shutil.copytree(whole[1] / "checkpoint-12", tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) == made
    state = made / "trainer_state.json"
    text = state.read_text()
    for broken in (text[:-2], text[: len(text) // 2], ""):
        state.write_text(broken)
        assert newest_checkpoint(tmp_path).name == "checkpoint-10"
        assert capsys.readouterr().out == f"{made} is half written (trainer_state.json breaks off): passed over\n"
    state.write_text(text)
    for name in ("optimizer.pt", "scheduler.pt", "model.safetensors"):
        kept = (made / name).read_bytes()
        (made / name).unlink()
        assert newest_checkpoint(tmp_path).name == "checkpoint-10"
        (made / name).write_bytes(kept)
    assert newest_checkpoint(tmp_path) == made
    assert newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("whole", ["fp32"], indirect=True)
def test_a_new_run_does_not_mix_with_an_old_one(whole, data, tmp_path, capsys):
    name, folder = whole
    assert main(command(name, data, folder)) == 2
    assert "holds checkpoints of an earlier run: go on with --resume" in capsys.readouterr().err
    shutil.copytree(folder / "checkpoint-10", tmp_path / "checkpoint-10")
    shutil.copy(folder / "train_config.json", tmp_path)
    assert main([*command(name, data, tmp_path), "--resume", "--learning-rate", "0.5"]) == 0
    assert "so that it will not be the same: learning-rate 0.003 -> 0.5" in capsys.readouterr().out
    assert main([*command(name, data, tmp_path), "--resume", "--stream", "--steps", "13"]) == 2
    assert "checkpoint-12 is of a run without --stream" in capsys.readouterr().err
