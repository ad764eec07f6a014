"""Plain `transformers.Trainer`: the same losses again, after a resume, and under every switch."""

import shutil

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from deepseek_v3 import DeepseekV3ForCausalLM, RouterBalanceCallback
from deepseek_v3.configuration import preset
from twins import make_model


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(0, 57, (48, 1), generator=generator)
    ids = (3 + (start + 5 * torch.arange(32)) % 57).tolist()  # something to learn
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def run(folder, dataset, resume=None, callbacks=(), config=None, columns=None, **arguments):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(preset("tiny", vocab_size=64, router_bias_update_rate=0.001, **(config or {})))
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_total_limit": 5,
    }
    args = TrainingArguments(output_dir=folder, **{**defaults, **arguments})
    evaluated = dataset.select(range(4)) if arguments.get("eval_strategy") else None
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=columns or dataset,
        eval_dataset=evaluated,
        callbacks=[RouterBalanceCallback(), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(one, two):
    state = two.model.state_dict()
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), dataset)


def test_training_learns_and_repeats_bit_for_bit(uninterrupted, dataset, tmp_path):
    again = run(tmp_path, dataset)
    assert losses(again) == losses(uninterrupted)
    assert_same_weights(again, uninterrupted)
    assert losses(again)[-1] < losses(again)[0] - 0.3


@pytest.mark.parametrize("shard_size", ["50GB", "150KB"])
def test_resume_gives_the_losses_of_the_uninterrupted_run(shard_size, uninterrupted, dataset, tmp_path):
    checkpoint = shutil.copytree(f"{uninterrupted.args.output_dir}/checkpoint-4", tmp_path / "checkpoint-4")
    if shard_size != "50GB":
        DeepseekV3ForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size=shard_size)
        assert not (checkpoint / "model.safetensors").exists()  # it would count before the shards
    resumed = run(tmp_path, dataset, resume=str(checkpoint))
    assert losses(resumed)[-4:] == losses(uninterrupted)[-4:]
    assert_same_weights(resumed, uninterrupted)


def test_the_best_model_comes_back_whole(dataset, tmp_path):
    trainer = run(
        tmp_path,
        dataset,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=4,
        greater_is_better=True,  # so that the best is not the last
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = DeepseekV3ForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    state = best.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_accumulation_equals_the_larger_batch(dataset, tmp_path):
    config = {"seq_balance_loss_alpha": 0.1}  # large enough to show if it were counted twice
    small = run(tmp_path / "a", dataset, per_device_train_batch_size=2, gradient_accumulation_steps=2, config=config)
    large = run(tmp_path / "b", dataset, per_device_train_batch_size=4, config=config)
    assert losses(small) == pytest.approx(losses(large), rel=1e-4)
    entry = small.state.log_history[0]
    assert entry["balance_loss"] == pytest.approx(large.state.log_history[0]["balance_loss"], rel=1e-5)
    biases = [[r.e_score_correction_bias for r in t.model.model.routers().values()] for t in (small, large)]
    for one, two in zip(*biases, strict=True):
        torch.testing.assert_close(one, two)
        assert one.abs().max() > 0.004


def test_checkpointing_changes_no_loss(uninterrupted, dataset, tmp_path):
    checkpointed = run(tmp_path, dataset, activation_checkpointing=True)
    assert losses(checkpointed) == losses(uninterrupted)


def test_bf16_learns_alike(dataset, tmp_path):
    low, high = (run(tmp_path / str(bf16), dataset, bf16=bf16, learning_rate=2e-3) for bf16 in (True, False))
    assert losses(low) == pytest.approx(losses(high), rel=0.01)
    assert low.model.model.layers[1].mlp.experts.down_proj.dtype == torch.float32


def test_packed_documents_train_as_if_apart(dataset, tmp_path):
    """Two documents in one row give the gradient of the two in a batch."""
    ids = torch.tensor(dataset["input_ids"][:2])
    model = make_model(vocab_size=64, seq_balance_loss_alpha=0.0).train()
    positions = torch.arange(32).repeat(2)[None]
    labels = ids.flatten()[None].clone()
    labels[0, 32] = -100  # the first token of a document is nobody's target
    packed = model(ids.flatten()[None], labels=labels, position_ids=positions)
    packed.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    apart = model(ids, labels=ids)
    apart.loss.backward()
    assert packed.loss.item() == pytest.approx(apart.loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_logs_hold_losses_load_and_bias(uninterrupted):
    entries = [entry for entry in uninterrupted.state.log_history if "loss" in entry]
    for entry in entries:
        parts = entry["main_loss"] + 0.3 * entry["mtp_loss"] + entry["balance_loss"]
        assert parts == pytest.approx(entry["loss"], rel=1e-4)
        assert len(entry["expert_load"]) == len(entry["router_bias"]) == 3
        assert all(sum(load) == pytest.approx(1) for load in entry["expert_load"])
        ratios = [max(load) * 8 for load in entry["expert_load"]]
        assert entry["max_load"] == pytest.approx(max(ratios))
        assert entry["max_vio"] == pytest.approx(sum(ratios) / 3 - 1)
    steps = torch.tensor(entries[-1]["router_bias"]) / 0.001  # whole steps of gamma, at most one for each update
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert 3 < steps.abs().max() < 8.01


def test_the_log_is_what_the_callbacks_after_it_see(dataset, tmp_path):
    class Watcher(TrainerCallback):
        seen: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    run(tmp_path, dataset, callbacks=[Watcher()], max_steps=1)
    assert "max_vio" in Watcher.seen[0]
    assert "mtp_loss" in Watcher.seen[0]
