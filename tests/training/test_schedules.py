"""The report's schedules against its published numbers, and a small Trainer run that follows and resumes them."""

import math
import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments

from deepseek_v3 import DeepseekV3ForCausalLM, RouterBalanceCallback
from deepseek_v3.configuration import preset
from deepseek_v3.training.scheduled_trainer import ScheduledTrainer
from deepseek_v3.training.schedules import BatchRamp, ReportSchedule
from deepseek_v3.training.stream import StepStream

RAMP = BatchRamp(3072, 15360, round(469e9 / 4096))
STEPS = 242_783  # that 14.8T tokens take


@pytest.fixture(scope="module")
def report():
    """The report's own run."""
    return ReportSchedule(STEPS, batch_ramp=RAMP)


def step_at(schedule, tokens):
    """The first step that has seen so many tokens."""
    seen = 0
    for step, size in enumerate(schedule.sizes):
        if seen >= tokens:
            return step
        seen += size * 4096
    raise AssertionError(tokens)


def test_batch_sizes_add_up_to_the_published_tokens(report):
    assert sum(report.sizes) * 4096 == pytest.approx(14.8e12, rel=1e-5)
    assert report.sizes[0] == 3072
    assert report.sizes[-1] == 15360
    assert report.sizes == sorted(report.sizes)
    halfway = report.sizes[step_at(report, 469e9 / 2)]
    assert halfway == pytest.approx((3072 + 15360) / 2, rel=1e-3)
    # Linear in tokens: the size grows by exp, and 5 = 15360 / 3072.
    assert report.sizes.index(15360) == pytest.approx(469e9 / (3072 * 4096) * math.log(5) / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0.1e12, 2.2e-4),
        (9.999e12, 2.2e-4),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),  # the middle of the 4.3T of cosine
        (14.301e12, 2.2e-5),
        (14.632e12, 2.2e-5),
        (14.634e12, 7.3e-6),
        (14.799e12, 7.3e-6),
    ],
)
def test_learning_rate_at_published_counts(report, tokens, rate):
    assert 2.2e-4 * report.learning_rate_factor(step_at(report, tokens)) == pytest.approx(rate, rel=1e-3)


def test_learning_rate_warms_up_over_2000_steps(report):
    assert report.learning_rate_factor(0) == 0
    assert report.learning_rate_factor(1000) == pytest.approx(0.5)
    assert report.learning_rate_factor(2000) == 1.0
    assert ReportSchedule(100, warmup_steps=10).learning_rate_factor(5) == 0.5


@pytest.mark.parametrize(
    ("tokens", "gamma", "weight"),
    [(0, 0.001, 0.3), (9.999e12, 0.001, 0.3), (10.001e12, 0.001, 0.1), (14.299e12, 0.001, 0.1), (14.301e12, 0, 0.1)],
)
def test_gamma_and_lambda_at_published_counts(report, tokens, gamma, weight):
    step = step_at(report, tokens)
    assert report.bias_update_rate(step) == gamma
    assert report.mtp_loss_weight(step) == weight


def test_a_run_without_a_ramp_has_the_same_shares():
    schedule = ReportSchedule(1480)
    assert [schedule.mtp_loss_weight(step) for step in (999, 1000)] == [0.3, 0.1]
    assert [schedule.bias_update_rate(step) for step in (1429, 1430)] == [0.001, 0.0]


def test_the_plain_scheduler_gives_the_factors():
    schedule = ReportSchedule(30, warmup_steps=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = schedule.lr_scheduler(optimizer)
    for step in range(30):
        assert optimizer.param_groups[0]["lr"] == 0.5 * schedule.learning_rate_factor(step)
        optimizer.step()
        scheduler.step()


class Watcher(TrainerCallback):
    """Rows of every forward, and gamma and lambda of every step."""

    def __init__(self):
        self.settings, self.rows, self.seen = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def look(module, args, kwargs):
            self.rows.append(kwargs["input_ids"].shape[0])
            self.seen += kwargs["input_ids"].tolist()

        model.register_forward_pre_hook(look, with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.settings.append((model.config.router_bias_update_rate, model.config.mtp_loss_weight, sum(self.rows)))
        self.rows.clear()


SCHEDULE = ReportSchedule(10, warmup_steps=2, batch_ramp=BatchRamp(2, 8, 20))


@pytest.fixture(scope="module")
def dataset():
    start = torch.randint(0, 57, (24, 1), generator=torch.Generator().manual_seed(1))
    ids = (3 + (start + 5 * torch.arange(16)) % 57).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def run(folder, dataset, schedule=SCHEDULE, resume=None, micro=3, **arguments):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(preset("tiny", vocab_size=64, num_hidden_layers=2))
    defaults = {"max_steps": 10, "per_device_train_batch_size": micro, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    watcher = Watcher()
    trainer = ScheduledTrainer(
        model=model,
        args=TrainingArguments(output_dir=folder, **{**defaults, **arguments}),
        train_dataset=dataset,
        callbacks=[RouterBalanceCallback(), watcher],
        schedule=schedule,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watcher


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), dataset)


def test_trainer_follows_the_schedule(whole):
    trainer, watcher = whole
    assert [rows for _, _, rows in watcher.settings] == SCHEDULE.sizes
    assert SCHEDULE.sizes[0] == 2 and SCHEDULE.sizes[-1] == 8
    expected = [(SCHEDULE.bias_update_rate(step), SCHEDULE.mtp_loss_weight(step)) for step in range(10)]
    assert [setting[:2] for setting in watcher.settings] == expected
    assert {weight for _, weight in expected} == {0.3, 0.1}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-2 * SCHEDULE.learning_rate_factor(step) for step in range(10)])
    assert trainer.model.config.router_bias_update_rate == 0.001  # what the user set is back
    assert trainer.model.config.mtp_loss_weight == 0.3


@pytest.mark.parametrize("step", [1, 3, 4, 9])
def test_resume_at_any_step_is_exact(step, whole, dataset, tmp_path):
    checkpoint = shutil.copytree(f"{whole[0].args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed, _ = run(tmp_path, dataset, resume=str(checkpoint), save_strategy="no")
    assert losses(resumed) == losses(whole[0])
    state = whole[0].model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_size_of_a_forward_changes_no_step(whole, dataset, tmp_path):
    larger, watcher = run(tmp_path, dataset, micro=8, save_strategy="no")
    assert losses(larger) == pytest.approx(losses(whole[0]), rel=1e-4)


def test_wrong_use_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="first = 8 exceeds last = 2"):
        BatchRamp(8, 2, 10)
    with pytest.raises(ValueError, match="multiple_of = 0"):
        BatchRamp(1, 2, 10, multiple_of=0)
    with pytest.raises(ValueError, match="steps = 0"):
        ReportSchedule(0)
    with pytest.raises(ValueError, match="schedule has 10 steps and max_steps is 4"):
        run(tmp_path, dataset, max_steps=4)
    with pytest.raises(ValueError, match="set gradient_accumulation_steps=1"):
        run(tmp_path, dataset, gradient_accumulation_steps=2)


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_data_without_a_length_ramps_in_its_own_order_and_resumes(kind, dataset, tmp_path):
    """Over more than one pass; the columns that no forward takes are left out."""
    rows = [{**row, "number": i} for i, row in enumerate(dataset)]
    if kind == "torch":

        class Rows(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(rows)

        stream = Rows()
    else:
        stream = IterableDataset.from_generator(lambda: iter(rows))
    whole, watcher = run(tmp_path / "whole", stream)
    assert [count for _, _, count in watcher.settings] == SCHEDULE.sizes
    order = [row["input_ids"] for row in rows] * 3
    assert len(order) > sum(SCHEDULE.sizes) > len(rows)
    assert watcher.seen == order[: sum(SCHEDULE.sizes)]
    for step in (1, 5):
        resumed, _ = run(
            tmp_path / str(step), stream, resume=f"{tmp_path}/whole/checkpoint-{step}", save_strategy="no"
        )
        assert losses(resumed) == losses(whole)


def test_a_stream_of_steps_is_read_once_by_every_rank():
    rows = StepStream(range(7), [2, 4, 6], rank=1, ranks=2)
    assert list(rows) == [[1], [3, 5], [0, 2, 4]]
    assert list(StepStream(range(7), [2, 4, 6], rank=0, ranks=2)) == [[0], [2, 4], [6, 1, 3]]
    with pytest.raises(ValueError, match="gives no row"):
        list(StepStream([], [2]))
