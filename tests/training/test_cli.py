"""The commands as a user types them."""

import json
import subprocess
import sys

import pytest
import torch

from deepseek_v3.cli import main


def test_help_of_every_command(capsys):
    for command in ([], ["train"], ["generate"], ["demo"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
        assert "deepseek-v3" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    data = folder / "data"
    data.mkdir()
    for i in range(40):
        (data / f"{i}.py").write_text(f"def function_{i}(argument):\n    return argument * {i}\n" * 40)
    command = ["train", "--data", str(data), "--output", str(folder / "out"), "--model", "tiny", "--vocab-size", "400"]
    command += ["--steps", "6", "--block", "64", "--batch", "2", "--held-out", "0.1", "--set", "mtp_loss_weight=0.1"]
    assert main(command) == 0
    return folder


def test_train_leaves_a_model_a_tokenizer_and_a_log(trained):
    config = json.loads((trained / "out" / "config.json").read_text())
    assert config["mtp_loss_weight"] == 0.1
    assert 256 < config["vocab_size"] <= 400
    log = json.loads((trained / "out" / "training_log.json").read_text())
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log if "loss" in entry)
    assert "max_vio" in log[0]


def test_generate_completes_prompts_and_train_goes_on(trained, capsys):
    assert (
        main(["generate", "--model", str(trained / "out"), "--prompt", "def f", "return", "--max-new-tokens", "4"])
        == 0
    )
    assert len(capsys.readouterr().out.strip()) > 5
    more = [
        "train",
        "--data",
        str(trained / "data"),
        "--output",
        str(trained / "more"),
        "--model",
        str(trained / "out"),
    ]
    assert main([*more, "--steps", "2", "--block", "64", "--batch", "2", "--held-out", "0.1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere", "--output", "out"], "nowhere does not exist"),
        (["train", "--data", "{data}", "--output", "out", "--model", "huge"], "neither a preset"),
        (["train", "--data", "{data}", "--output", "out", "--set", "n_group"], "write FIELD=VALUE"),
        (["train", "--data", "{data}", "--output", "out", "--set", "n_group=3", "--held-out", "0.1"], "n_group = 3"),
        (["generate", "--model", "nowhere", "--prompt", "x"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(data=trained / "data") for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_module_form_runs():
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_v3.cli", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "train" in done.stdout
