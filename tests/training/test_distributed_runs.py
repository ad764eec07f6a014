"""Two processes against one: DDP, FSDP2 and (where DeepSpeed is installed) ZeRO-3 under Trainer, saved and resumed."""

import importlib.util
import json

import distributed_worker as worker
import pytest
import torch
from children import run_ranks
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deepseek_v3.training.balance import routers_of

HOW = ["ddp", "fsdp2", *(["zero3"] if importlib.util.find_spec("deepspeed") else [])]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return worker.write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def alone(bases, tmp_path_factory):
    """kind -> trainer and what it knows, of one process."""
    folder = tmp_path_factory.mktemp("alone")
    kinds = ("full", "lora", "fp8")
    return {kind: worker.run(folder / kind, lambda kind=kind: worker.make(kind, bases)) for kind in kinds}


@pytest.fixture(scope="module", params=HOW)
def launched(request, bases, tmp_path_factory):
    """How two processes were launched, their folder, and what each knows."""
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(worker.main, folder, bases, request.param, folder=folder)
    return request.param, folder, [json.loads((folder / f"rank{i}.json").read_text()) for i in range(2)]


def assert_like_one_process(ranks, expected, kind):
    assert ranks[0][kind]["biases"] == ranks[1][kind]["biases"]
    for rank in ranks:
        for name in ("loss", "main_loss", "mtp_loss"):
            assert rank[kind][name] == pytest.approx(expected[name], rel=1e-5), name
        torch.testing.assert_close(torch.tensor(rank[kind]["expert_load"]), torch.tensor(expected["expert_load"]))
        torch.testing.assert_close(torch.tensor(rank[kind]["biases"]), torch.tensor(expected["biases"]))
    assert torch.tensor(expected["biases"]).abs().max() > 0.015
    assert min(expected["mtp_loss"]) > 3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_losses_and_balance_are_those_of_one_process(kind, launched, alone):
    how, _, ranks = launched
    trainer, expected = alone[kind]
    assert_like_one_process(ranks, expected, kind)
    every = {name for name, _ in trainer.model.named_parameters()}
    assert set(ranks[1][kind]["sharded"]) == (set() if how == "ddp" else every)


def test_what_one_launch_checks_besides(launched, alone, bases):
    """Adapters over sharded FP8 codes, and weights that transformers shards as it reads them."""
    how, folder, ranks = launched
    if how == "fsdp2":
        assert_like_one_process(ranks, alone["fp8"][1], "fp8")
        assert sum(name.endswith("_scale_inv") for name in ranks[0]["fp8"]["sharded"]) > 30
    if how == "ddp":
        assert_like_one_process(ranks, alone["full"][1], "loaded")
        assert set(ranks[0]["loaded"]["sharded"]) == {name for name, _ in alone["full"][0].model.named_parameters()}
        saved = AutoModelForCausalLM.from_pretrained(folder / "loaded" / "final").state_dict()
        for name, tensor in AutoModelForCausalLM.from_pretrained(folder / "full" / "final").state_dict().items():
            assert (saved[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, launched):
    _, _, ranks = launched
    for rank in ranks:
        for name in ("loss", "mtp_loss", "router_bias"):
            assert rank[f"{kind} resumed"][name][-1] == rank[kind][name][-1], name
        assert len(rank[f"{kind} resumed"]["loss"]) == 3  # two of them from the checkpoint's state


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_saved_is_what_was_trained(kind, launched, alone, bases, tmp_path):
    _, folder, ranks = launched
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(folder / kind / "final")
    else:
        model = PeftModel.from_pretrained(worker.make("full", bases), folder / kind / "final")
        # An adapter's files hold no biases.
        for router, bias in zip(routers_of(model), ranks[0][kind]["biases"], strict=True):
            router.e_score_correction_bias.copy_(torch.tensor(bias))
    loaded = worker.trainer_of(tmp_path, lambda: model).evaluate()["eval_loss"]
    before = worker.trainer_of(tmp_path, lambda: worker.make(kind, bases)).evaluate()["eval_loss"]
    assert before > loaded + 0.03
    for rank in ranks:
        assert rank[kind]["eval_loss"] == pytest.approx(loaded, rel=1e-6)
    assert alone[kind][0].evaluate()["eval_loss"] == pytest.approx(loaded, rel=1e-5)
