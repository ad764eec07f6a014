"""TRL's trainers on this model: each example runs as its docstring says and learns; what their losses are made of."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


def from_to(what, text):
    return tuple(map(float, re.search(rf"^{what} (-?[\d.]+) to (-?[\d.]+)", text, re.MULTILINE).groups()))


@pytest.mark.parametrize("fp8", [False, True], ids=["lora", "fp8"])
def test_supervised_with_the_loss_of_the_mtp_modules(fp8, run_example, tmp_path):
    said = run_example("trl_sft.py", "--steps", "12", *(["--fp8"] if fp8 else []))
    for what in ("loss", "mtp loss"):
        first, last = from_to(what, said)
        assert last < first - 0.5, what
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokens, before = torch.tensor([[3, 4, 5, 6, 7]]), {n: p.clone() for n, p in base.named_parameters()}
    with torch.no_grad():
        plain = base(tokens, output_mtp_logits=True).mtp_logits[0]
        trained = AutoModelForCausalLM if fp8 else PeftModel
        given = (tmp_path / "trained",) if fp8 else (base, tmp_path / "trained")
        moved = trained.from_pretrained(*given)
        assert (moved(tokens, output_mtp_logits=True).mtp_logits[0] - plain).abs().max() > 0.01
    if fp8:
        state = moved.state_dict()
        assert all((state[name] - weight).abs().max() > 0 for name, weight in before.items())


def test_preferences(run_example, tmp_path):
    said = run_example("trl_dpo.py", "--steps", "12")
    assert from_to("loss", said)[1] < 0.6 < from_to("loss", said)[0] < 0.75
    assert from_to("margin", said)[1] > 0.2
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_rewards_of_what_the_model_generates(run_example, tmp_path):
    said = run_example("trl_grpo.py", "--steps", "18", "--length", "4")
    first, last = from_to("reward", said)
    assert last > first + 0.05
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_the_supervised_loss_is_the_models_and_trls_own_is_the_main_part_of_it(tmp_path, monkeypatch):
    from trl import SFTConfig, SFTTrainer

    from twins import make_model

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from small import make_tokenizer
    from trl_sft import ModelLossTrainer

    tokenizer = make_tokenizer()
    ids = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]]
    rows = Dataset.from_dict({"input_ids": ids})
    model = make_model()
    with torch.no_grad():
        expected = model(torch.tensor(ids), labels=torch.tensor(ids))
    losses = {}
    for trainer in (SFTTrainer, ModelLossTrainer):
        options = {"max_steps": 1, "use_cpu": True, "report_to": [], "bf16": False, "save_strategy": "no"}
        arguments = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, logging_steps=1, **options)
        made = trainer(model=make_model(), args=arguments, train_dataset=rows, processing_class=tokenizer)
        made.train()
        losses[trainer.__name__] = made.state.log_history[0]["loss"]
    assert losses["SFTTrainer"] == pytest.approx(float(expected.main_loss), rel=1e-4)
    assert losses["ModelLossTrainer"] == pytest.approx(float(expected.loss), rel=1e-4)
    assert float(expected.loss) > float(expected.main_loss) + 0.5
