"""The report's schedules against its published numbers, and Trainer under them: sizes, rates, exact resume."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from deepseek_v3 import RouterBalanceCallback
from deepseek_v3.training.scheduled_trainer import ScheduledTrainer
from deepseek_v3.training.schedules import BatchRamp, ReportSchedule, StepBatches
from twins import make_model

# Without a ramp a step of 148,000 is a tenth of a billion tokens.
RUN = ReportSchedule(148_000, warmup_steps=20)


@pytest.mark.parametrize(
    "trillions, rate",
    [(1, 2.2e-4), (9.99, 2.2e-4), (12.15, (2.2e-4 + 2.2e-5) / 2), (14.31, 2.2e-5), (14.62, 2.2e-5), (14.7, 7.3e-6)],
)
def test_the_learning_rate_is_the_published_one(trillions, rate):
    assert 2.2e-4 * RUN.learning_rate_factor(round(trillions * 1e4)) == pytest.approx(rate, rel=1e-3)


def test_warm_up_is_linear_and_rates_change_where_the_report_changed_them():
    assert [RUN.learning_rate_factor(step) for step in (0, 5, 10, 20)] == [0, 0.25, 0.5, 1]
    assert [RUN.bias_update_rate(step) for step in (0, 142_999, 143_001, 147_999)] == [0.001, 0.001, 0, 0]
    assert [RUN.mtp_loss_weight(step) for step in (0, 99_999, 100_001)] == [0.3, 0.3, 0.1]


def test_the_reports_ramp_takes_469_billion_tokens():
    sizes = BatchRamp(3072, 15360, 114_501_953).sizes(20_000)
    assert sizes[0] == 3072 and sizes[-1] == 15360 and sizes == sorted(sizes)
    ramp = sum(size for size in sizes if size < 15360) * 4096
    assert ramp == pytest.approx(469e9, rel=1e-3)


def test_every_rank_draws_its_own_rows_and_no_row_twice_in_a_pass():
    ranks = [list(StepBatches(24, [2, 4, 6, 12], seed=1, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [len(step) for step in ranks[0]] == [1, 2, 3, 6]
    drawn = [row for steps in zip(*ranks, strict=True) for part in steps for row in part]
    assert sorted(drawn) == list(range(24))
    with pytest.raises(ValueError, match="multiple_of=2"):
        StepBatches(24, [3], seed=0, rank=0, ranks=2)


def trainer(folder, steps=8, **more):
    ramp = BatchRamp(2, 6, 16, multiple_of=2)
    rows = torch.randint(3, 512, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="steps", save_steps=1, disable_tqdm=True, learning_rate=1e-3, seed=3, **more,
    )  # fmt: skip
    schedule = ReportSchedule(steps, warmup_steps=2, batch_ramp=ramp)
    return ScheduledTrainer(
        model=make_model(), args=arguments, train_dataset=data, callbacks=[RouterBalanceCallback()], schedule=schedule
    )


def losses(history):
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_run_follows_its_schedule_and_resumes_exactly_at_any_step(tmp_path):
    whole = trainer(tmp_path / "whole")
    before = whole.model.config.mtp_loss_weight
    whole.train()
    history = [entry for entry in whole.state.log_history if "loss" in entry]
    schedule = whole.schedule
    assert schedule.sizes[0] == 2 and schedule.sizes[-1] == 6
    expected = [1e-3 * schedule.learning_rate_factor(step) for step in range(8)]
    assert [entry["learning_rate"] for entry in history] == pytest.approx(expected)
    assert whole.model.config.mtp_loss_weight == before
    # The MTP loss weighs less in the last step, and the biases move by gamma.
    first, last = history[0], history[-1]
    for entry, weight in ((first, 0.3), (last, 0.1)):
        total = entry["main_loss"] + weight * entry["mtp_loss"] + entry["balance_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    moved = torch.tensor(last["router_bias"]) - torch.tensor(history[-2]["router_bias"])
    assert set((moved.abs() * 1e3).round().flatten().tolist()) <= {0.0, 1.0} and moved.any()
    for step in (3, 6):
        again = trainer(tmp_path / f"from-{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(again.state.log_history) == losses(whole.state.log_history)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name


def test_biases_stay_where_gamma_is_zero(tmp_path):
    own = trainer(tmp_path, steps=2)
    own.schedule = ReportSchedule(2, batch_ramp=own.schedule.batch_ramp, bias_update_rates=(0.0, 0.0))
    own.callback_handler.callbacks[0].schedule = own.schedule
    before = [gate.e_score_correction_bias.clone() for gate in own.model.model.routers().values()]
    own.train()
    after = [gate.e_score_correction_bias for gate in own.model.model.routers().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1"):
        trainer(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="a ramp rises"):
        BatchRamp(8, 4, 10)
    with pytest.raises(ValueError, match="at least 1"):
        ReportSchedule(0)
