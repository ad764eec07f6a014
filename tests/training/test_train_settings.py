"""Options from files and from the command line, and what is refused before anything is read or written."""

import json

import pytest

from deepseek_v3.cli import main, make_parser
from deepseek_v3.training.train_settings import (
    TrainSettings,
    as_options,
    make_settings,
    option_types,
    read_config,
    settled,
)


def write(folder, text, name="run.yaml"):
    file = folder / name
    file.write_text(text)
    return str(file)


def test_yaml_and_json_give_the_same_settings(tmp_path):
    yaml = "data: [notes/, more.txt]\noutput: out\nlearning-rate: 3e-4\nvocab-size: 500\nstream: true\nsteps: 7\n"
    yaml += "set: {n_group: 2, mtp_loss_weight: 0.1}\nbatch-ramp: [1, 2, 3]\ntokenizer: null\nheld-out: 0\n"
    options = {"data": ["notes/", "more.txt"], "output": "out", "learning-rate": 3e-4, "vocab-size": 500}
    options |= {"stream": True, "steps": 7, "set": {"n_group": 2, "mtp_loss_weight": 0.1}, "batch-ramp": [1, 2, 3]}
    options |= {"tokenizer": None, "held-out": 0}
    one = make_settings(read_config(write(tmp_path, yaml)), {})
    two = make_settings(read_config(write(tmp_path, json.dumps(options), "run.json")), {})
    assert one == two
    expected = TrainSettings(data=["notes/", "more.txt"], output="out", learning_rate=3e-4, vocab_size=500)
    expected.stream, expected.steps, expected.batch_ramp, expected.held_out = True, 7, [1, 2, 3], 0.0
    expected.overrides = {"n_group": 2, "mtp_loss_weight": 0.1}
    assert one == expected and isinstance(one.held_out, float)


def test_the_command_line_wins(tmp_path, monkeypatch):
    """As the parser hands it to `train`."""
    from deepseek_v3.training import train as module

    seen = []
    monkeypatch.setattr(module, "train", seen.append)
    file = write(tmp_path, "data: [a]\noutput: there\nblock: 64\nseed: 3\nmask-documents: true\nset: {a: 1, b: 2}\n")
    line = ["train", "--config", file, "--output", "here", "--seed", "4", "--no-mask-documents", "--set", "b=[3]"]
    assert main(line) == 0
    (settings,) = seen
    assert (settings.output, settings.seed, settings.mask_documents) == ("here", 4, False)
    assert (settings.data, settings.block, settings.overrides) == (["a"], 64, {"a": 1, "b": [3]})
    assert settings.batch == TrainSettings().batch  # what neither gives


def test_every_option_goes_round_through_a_file(tmp_path):
    settings = settled(TrainSettings(data=["a"], output="b", overrides={"n_group": 2}))
    assert (settings.steps, settings.warmup, settings.log_steps) == (400, 40, 10)
    options = as_options(settings)
    assert set(options) == set(option_types())
    file = write(tmp_path, json.dumps(options), "train_config.json")
    assert make_settings(read_config(file), {}) == settings


def test_the_reports_schedule_keeps_its_own_warmup():
    assert settled(TrainSettings(data=["a"], output="b", schedule="report")).warmup is None
    assert settled(TrainSettings(data=["a"], output="b", schedule="report", warmup=5)).warmup == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "learning_rate: 0.1", "c.yaml: there is no option 'learning_rate'; did you mean learning-rate?"),
        ("c.yaml", "stepps: 3", "c.yaml: there is no option 'stepps'; did you mean steps?"),
        ("c.yaml", "steps: many", "c.yaml: steps = 'many': write int"),
        ("c.yaml", "steps: true", "c.yaml: steps = True: write int"),
        ("c.yaml", "steps: 1.5", "c.yaml: steps = 1.5: write int"),
        ("c.yaml", "seed: null", "c.yaml: seed = None: write int"),
        ("c.yaml", "learning-rate: fast", "c.yaml: learning-rate = 'fast': write float"),
        ("c.yaml", "stream: 1", "c.yaml: stream = 1: write bool"),
        ("c.yaml", "data: notes", "c.yaml: data = 'notes': write a list of str"),
        ("c.yaml", "batch-ramp: [1, x, 2]", "c.yaml: batch-ramp = [1, 'x', 2]: write a list of int"),
        ("c.yaml", "set: [a]", "c.yaml: set = ['a']: write FIELD: VALUE pairs"),
        ("c.yaml", "a: [", "c.yaml is not YAML"),
        ("c.yaml", "", "c.yaml holds no options"),
        ("c.json", "{", "c.json is not JSON"),
        ("c.toml", "a = 1", "c.toml: a configuration's name ends with .yaml, .yml or .json"),
        ("c.yaml", "data: [a]\noutput: b\nprecision: fp4", "--precision fp4: choose from fp32, bf16, fp8"),
    ],
)
def test_a_bad_file_is_one_line_with_file_and_key(name, text, message, tmp_path, capsys):
    file = write(tmp_path, text, name)
    assert main(["train", "--config", file]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
        (["--output", "o"], "--data is missing"),
        (["--data", "d"], "--output is missing"),
        (["--stream"], "a stream has no known length: give --steps"),
        (["--stream", "--steps", "4", "--limit-bytes", "9"], "--limit-bytes does not go with --stream"),
        (["--batch-ramp", "1", "2", "3"], "--batch-ramp belongs to --schedule report"),
        (["--schedule", "report", "--batch-ramp", "1", "2", "3", "--accumulation", "2"], "leave --accumulation out"),
        (["--scale-fmt", "ue8m0"], "--scale-fmt belongs to --precision fp8"),
        (["--fp8-statistics", "3", "--precision", "bf16"], "--fp8-statistics belongs to --precision fp8"),
        (["--eval-steps", "3", "--held-out", "0"], "give --held-out above 0"),
        (["--held-out", "1"], "--held-out 1.0: give a share"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--learning-rate", "0"], "--learning-rate 0.0: give a number above 0"),
        (["--resume"], "o holds no run to resume"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"--config": [], "--output": [], "--data": []}.get(arguments[0], ["--data", "d", "--output", "o"])
    assert main(["train", *given, *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in (*option_types(), "config"))
