"""TRL's trainers on this model: each example runs as its docstring says and learns; what their losses are made of."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deepseek_v3 import enable_fp8_training
from deepseek_v3.training import FP8StatisticsCallback

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


def test_two_lines_train_in_fp8_and_the_folder_loads_anywhere(tmp_path, monkeypatch):
    """`enable_fp8_training` before TRL's own trainer; its loss comes from the logits, and the stop knows that too."""
    from trl import SFTConfig, SFTTrainer

    from twins import make_model

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from small import make_tokenizer

    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(1)).tolist()
    usual = {"use_cpu": True, "report_to": [], "bf16": False, "logging_steps": 1, "save_strategy": "no"}

    def made(model, **options):
        arguments = SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, learning_rate=1e-2, **usual, **options
        )
        rows = Dataset.from_dict({"input_ids": ids})
        return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=make_tokenizer())

    model = make_model(vocab_size=64)
    enable_fp8_training(model)
    trainer = made(model, max_steps=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(str(tmp_path / "plain"))
    model.save_pretrained(tmp_path / "official", quantize="fp8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    tokens = torch.tensor(ids[:2])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
        rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "official", dtype=torch.float32)
        assert not torch.equal(rounded(tokens).logits, loaded(tokens).logits)
        agree = torch.nn.functional.cosine_similarity(rounded(tokens).logits, loaded(tokens).logits, dim=-1)
    assert agree.median() > 0.99  # rounding moves the choice of an expert here and there
    model.train().model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")
    broken = made(model, max_steps=1)
    broken.add_callback(FP8StatisticsCallback())
    with pytest.raises(FloatingPointError, match=r"the output of model.layers.1.self_attn.o_proj"):
        broken.train()


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
