"""Adapters under plain `transformers.Trainer` with the router's balance: learning, MTP, resuming, biases."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deepseek_v3 import FP8Config, RouterBalanceCallback, lora_target_modules
from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint
from deepseek_v3.training.balance import load_router_bias, routers_of, save_router_bias
from twins import make_model


@pytest.fixture(scope="module")
def dataset():
    start = torch.randint(0, 57, (48, 1), generator=torch.Generator().manual_seed(1))
    ids = (3 + (start + 5 * torch.arange(24)) % 57).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(preset("tiny"), folder)
    return folder


def base_model(fp8_folder, fp8):
    if fp8:
        return AutoModelForCausalLM.from_pretrained(fp8_folder, quantization_config=FP8Config(keep=True))
    return AutoModelForCausalLM.from_pretrained(fp8_folder, dtype=torch.float32)


def run(folder, dataset, base, resume=None, callback=None, **arguments):
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, **lora_target_modules(base.config, "all")))
    defaults = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"save_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(output_dir=folder, **{**defaults, **arguments})
    trainer = Trainer(
        model=model, args=args, train_dataset=dataset, callbacks=[callback or RouterBalanceCallback(update_rate=0.01)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def biases(model):
    return torch.stack([router.e_score_correction_bias for router in routers_of(model)])


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(fp8, restore, fp8_folder, dataset, tmp_path):
    before = biases(base_model(fp8_folder, fp8)).clone()
    whole = run(tmp_path / "whole", dataset, base_model(fp8_folder, fp8))
    moved = (biases(whole.model) - before).abs()
    assert 0.03 < moved.max() < 0.0801
    assert logged(whole, "mtp_loss")[-1] < logged(whole, "mtp_loss")[0] - 0.05
    assert logged(whole)[-1] < logged(whole)[0] - 0.1
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    options = {"restore_callback_states_from_checkpoint": restore}
    resumed = run(tmp_path / "again", dataset, base_model(fp8_folder, fp8), resume=str(checkpoint), **options)
    assert logged(resumed)[-4:] == logged(whole)[-4:]
    assert logged(resumed, "router_bias") == logged(whole, "router_bias")
    assert torch.equal(biases(resumed.model), biases(whole.model))


def test_a_callback_that_served_another_model_leaves_a_new_one_alone(fp8_folder, dataset, tmp_path):
    callback = RouterBalanceCallback(update_rate=0.01)
    run(tmp_path, dataset, base_model(fp8_folder, False), callback=callback, max_steps=2)
    base = base_model(fp8_folder, False)
    before = biases(base).clone()
    callback.update_rate = 0
    run(tmp_path / "other", dataset, base, callback=callback, max_steps=1)
    assert torch.equal(biases(base), before)


def test_checkpoints_of_another_model_are_refused(fp8_folder, dataset, tmp_path):
    run(tmp_path / "whole", dataset, base_model(fp8_folder, False), max_steps=4)
    state = tmp_path / "whole" / "checkpoint-4" / "trainer_state.json"
    callback = RouterBalanceCallback()
    callback._routers = routers_of(make_model())[:2]
    values = json.loads(state.read_text())
    values["stateful_callbacks"]["RouterBalanceCallback"] = callback.state()
    state.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"trainer_state.json holds the biases of 2 routers.*the 3 of this model"):
        run(tmp_path / "again", dataset, base_model(fp8_folder, False), resume=str(state.parent))


def test_the_biases_go_with_a_finished_adapter(fp8_folder, dataset, tmp_path):
    trainer = run(tmp_path / "run", dataset, base_model(fp8_folder, False))
    model, tokens = trainer.model.eval(), torch.tensor(dataset["input_ids"][:2])
    model.save_pretrained(tmp_path / "adapter")
    save_router_bias(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base_model(fp8_folder, False), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert not torch.equal(again(tokens).logits, model(tokens).logits)
        load_router_bias(again, tmp_path / "adapter")
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="do not fit the 2 of this model"):
        load_router_bias(make_model(num_nextn_predict_layers=0), tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="were not moved"):
        load_router_bias(again, tmp_path)


def test_accumulation_and_checkpointing_change_no_loss(fp8_folder, dataset, tmp_path):
    plain = run(tmp_path / "a", dataset, base_model(fp8_folder, False), max_steps=4)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "activation_checkpointing": True}
    split = run(tmp_path / "b", dataset, base_model(fp8_folder, False), max_steps=4, **parts)
    assert logged(split) == pytest.approx(logged(plain), rel=1e-4)
    torch.testing.assert_close(biases(split.model), biases(plain.model))
