"""Every example runs as its docstring says, with few steps, and leaves what it promises."""

import re
from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import AutoConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(run_example):
    """Runs an example, which says that it learnt."""

    def learnt(name, folder, *arguments):
        said = run_example(name, *arguments, folder=folder)
        first, last = map(float, re.search(r"^loss ([\d.]+) to ([\d.]+);", said, re.MULTILINE).groups())
        assert last < first, said

    return learnt


@pytest.mark.parametrize("name", ["lora_sft.py", "qlora_experts.py"])
def test_adapters(name, run, tmp_path):
    run(name, tmp_path, "--steps", "12")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= set(config.target_parameters)


def test_pretraining_goes_on_in_fp8_over_fp8_files(run, tmp_path):
    run("continue_pretraining_fp8.py", tmp_path, "--steps", "6")
    first = tmp_path / "fp8"
    assert AutoConfig.from_pretrained(first).quantization_config["quant_method"].endswith("fp8")
    again = tmp_path / "again"
    again.mkdir()
    (again / "text.txt").write_text("one and one is two\n")
    run("continue_pretraining_fp8.py", again, "--steps", "6", "--model", str(first), "--data", str(again / "text.txt"))
    assert (again / "fp8" / "model.safetensors").is_file()


@pytest.mark.parametrize("arguments", [["sequence"], ["token", "--lora"], ["reward"]], ids=lambda value: value[0])
def test_heads(arguments, run, tmp_path):
    run("classification.py", tmp_path, "--steps", "12", "--task", *arguments)
    left = {path.name for path in (tmp_path / arguments[0]).iterdir()}
    assert ("adapter_config.json" if "--lora" in arguments else "model.safetensors") in left


def test_each_example_is_in_the_tutorial():
    tutorial = (EXAMPLES.parent / "docs" / "tutorial.md").read_text()
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"small.py"}
    assert len(scripts) >= 4 and all(name in tutorial for name in scripts)
