"""The commands as a user types them."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_v3 import LatentCache
from deepseek_v3.cli import main
from deepseek_v3.training import distill
from deepseek_v3.training.demo_decoding import compare_decoding


def test_help_of_every_command(capsys):
    for command in ([], ["train"], ["distill"], ["generate"], ["demo"]):
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


def test_generate_streams_completions_with_figures(trained, capsys):
    command = ["generate", "--model", str(trained / "out"), "--prompt", "def f", "return", "--max-new-tokens", "12"]
    shown = {}
    for drafts in ("0", "2", "auto"):
        assert main([*command, "--drafts", drafts]) == 0
        shown[drafts] = capsys.readouterr()
    assert shown["0"].out.startswith("def f") and "\nreturn" in shown["0"].out
    assert shown["0"].out == shown["2"].out == shown["auto"].out
    assert [len(shown[drafts].err.split("accepted by depth")) - 1 for drafts in shown] == [0, 2, 2]
    assert "[12 tokens, " in shown["0"].err


def test_generate_takes_the_kind_of_cache(trained, capsys):
    folder, prompt = str(trained / "out"), "def function_1(argument):\n    return"
    command = ["generate", "--model", folder, "--prompt", prompt, "--max-new-tokens", "24"]
    kind = {"dtype": torch.float8_e4m3fn, "sliding_window": 3}
    assert main([*command, "--cache-dtype", "float8_e4m3fn", "--sliding-window", "3"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = {name: tokenizer(prompt, return_tensors="pt")[name] for name in ("input_ids", "attention_mask")}
    cache = LatentCache(model.config, **kind)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, past_key_values=cache)[0]
    assert capsys.readouterr().out == prompt + tokenizer.decode(out[inputs["input_ids"].shape[1] :]) + "\n"


def test_the_demo_compares_decodings_of_the_same_text(trained):
    folder = trained / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = compare_decoding(model, tokenizer, ["def f", "return argument"], new_tokens=20)
    assert found["same_text"] and found["prompts"] == 2
    assert 1 <= found["tokens_per_step"] <= 5 and all(0 <= rate <= 1 for rate in found["acceptance"])
    assert min(found["seconds"].values()) > 0


def test_train_goes_on_from_a_folder(trained):
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


@pytest.mark.parametrize("temperature", ["0", "1.5"])
def test_distill_leaves_the_main_model_as_it_is(temperature, trained, tmp_path, monkeypatch, capsys):
    asked, write = [], distill.own_text
    monkeypatch.setattr(distill, "own_text", lambda *args, **options: asked.append(options) or write(*args, **options))
    source, output = trained / "out", tmp_path / "distilled"
    command = ["distill", "--model", str(source), "--data", str(trained / "data"), "--output", str(output)]
    command += ["--rows", "8", "--prompt", "16", "--new-tokens", "16", "--steps", "12", "--warmup", "2"]
    assert main([*command, "--held-out", "0.1", "--temperature", temperature]) == 0
    assert asked == [{"do_sample": True, "temperature": 1.5} if temperature == "1.5" else {}]
    assert "8 prompts of 16 tokens" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (source, output))
    module = "model.layers.3."
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert f"{module}eh_proj.weight" in changed and all(name.startswith(module) for name in changed)
    log = json.loads((output / "distill_log.json").read_text())
    losses = [entry["loss"] for entry in log["log"] if "loss" in entry]
    assert losses[-1] < losses[0] and len(log["acceptance"]) == len(log["acceptance_before"]) == 1
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere", "--output", "out"], "nowhere does not exist"),
        (["train", "--data", "{data}", "--output", "out", "--model", "huge"], "neither a preset"),
        (["train", "--data", "{data}", "--output", "out", "--set", "n_group"], "write FIELD=VALUE"),
        (["train", "--data", "{data}", "--output", "out", "--set", "n_group=3", "--held-out", "0.1"], "n_group = 3"),
        (["generate", "--model", "{data}/../out", "--prompt", "x", "--sliding-window", "0"], "sliding_window = 0"),
        (["generate", "--model", "nowhere", "--prompt", "x"], "nowhere"),
        (["distill", "--model", "nowhere", "--data", "{data}", "--output", "out"], "nowhere is no model folder"),
        (["distill", "--model", "{data}/../out", "--data", "{data}", "--output", "{data}/../out"], "own folder"),
        (
            ["distill", "--model", "{data}/../out", "--data", "{data}", "--output", "out", "--held-out", "0.1"]
            + ["--depth", "0"],
            "depth = 0",
        ),
        (["generate", "--model", "{data}/../out", "--prompt", "x", "--chat"], "no chat template"),
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
