"""`torchrun deepseek-v3 finetune`: two processes learn what one does, and one of them writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deepseek_v3
from deepseek_v3.cli import main
from deepseek_v3.configuration import preset
from deepseek_v3.training.data import train_tokenizer
from twins import spread_weights


def test_two_processes_finetune_like_one(tmp_path):
    tokenizer = train_tokenizer(["one and one is two", "two and two is four"] * 4, 280)
    model = deepseek_v3.DeepseekV3ForCausalLM(preset("tiny", vocab_size=len(tokenizer), num_hidden_layers=2))
    spread_weights(model).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{word} and {word} is", "completion": " two"} for word in ("one", "two", "is", "and")] * 4
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["finetune", "--model", str(tmp_path / "base"), "--data", str(tmp_path / "data.jsonl"), "--steps", "3"]
    command += ["--accumulation", "1", "--no-packing", "--rank", "2", "--dtype", "float32", "--warmup", "1"]
    command += ["--router-bias-rate", "0.01", "--merge", "bf16", "--learning-rate", "1e-3"]
    assert main([*command, "--output", str(tmp_path / "one"), "--batch", "4"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    script = Path(sys.executable).with_name("deepseek-v3")
    launcher += ["--rdzv-endpoint", "localhost:0", "--no-python", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command, "--output", str(tmp_path / "two"), "--batch", "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"{tmp_path / 'two'}: loss") == 1
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    for name in ("first_loss", "last_loss", "main_loss", "mtp_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    assert one["last_loss"] < one["first_loss"]
    biases = [load_file(tmp_path / name / "router_bias.safetensors") for name in ("one", "two")]
    assert all(torch.equal(bias, biases[1][layer]) for layer, bias in biases[0].items())
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
