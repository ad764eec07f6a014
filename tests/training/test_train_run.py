"""What a run logs, measures and draws, and the Trainer that the options make."""

import json

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from deepseek_v3 import RouterBalanceCallback
from deepseek_v3.cli import main
from deepseek_v3.training import AdamWBF16
from deepseek_v3.training import train as module
from deepseek_v3.training.balance import routers_of
from deepseek_v3.training.data import head, pack, read_texts, split_texts, train_tokenizer
from deepseek_v3.training.evaluation import bits_per_byte, held_out_measures, mtp_acceptance
from deepseek_v3.training.fp8.enable import fp8_modules
from deepseek_v3.training.run_trainer import RunTrainer
from deepseek_v3.training.train_settings import TrainSettings, read_config, settled
from twins import make_model

TEXTS = [f"def function_{i}(argument):\n    return argument * {i}  # ünï\n" * (1 + i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("mask", [False, True])
def test_measures_are_those_of_the_single_measurements(mask, tokenizer):
    model = make_model(vocab_size=len(tokenizer), num_nextn_predict_layers=2).train()
    blocks = pack(TEXTS[:8], tokenizer, 24, mask)
    measures = held_out_measures(model, tokenizer, TEXTS[:3], blocks)
    assert model.training
    model.eval()
    summed, count = 0.0, 0
    for block in blocks:
        ids = torch.tensor([block["input_ids"]])
        positions = torch.tensor([block["position_ids"]]) if mask else None
        with torch.no_grad():
            logits = model(ids, position_ids=positions).logits.double()[0, :-1]
        kept = positions[0, 1:] != 0 if mask else torch.ones(23, dtype=torch.bool)
        summed += nn.functional.cross_entropy(logits[kept], ids[0, 1:][kept], reduction="sum").item()
        count += int(kept.sum())
    assert measures["main_loss"] == pytest.approx(summed / count, rel=1e-5)
    assert measures["bits_per_byte"] == bits_per_byte(model, tokenizer, TEXTS[:3], 24)
    assert set(measures) == {"main_loss", "bits_per_byte", "mtp_acceptance_1", "mtp_acceptance_2", "max_vio"}
    if not mask:
        rates = [measures["mtp_acceptance_1"], measures["mtp_acceptance_2"]]
        assert rates == mtp_acceptance(model, blocks["input_ids"])
        assert measures["max_vio"] == pytest.approx(max_vio_of(model, blocks["input_ids"]), rel=1e-5)


def max_vio_of(model, rows):
    """From the experts that every router chose, MTP modules' included, all blocks in one batch."""
    chosen = []
    handles = [router.register_forward_hook(lambda m, a, out: chosen.append(out[2])) for router in routers_of(model)]
    with torch.no_grad():
        model(torch.tensor(rows[:]), output_mtp_logits=True)
    for handle in handles:
        handle.remove()
    assert len(chosen) == 4
    loads = [experts.flatten().bincount(minlength=8) for experts in chosen]
    return sum(load.max().item() * 8 / load.sum().item() - 1 for load in loads) / len(loads)


def test_a_model_without_mtp_or_experts_is_measured_without(tokenizer):
    model = make_model(vocab_size=len(tokenizer), num_nextn_predict_layers=0, first_k_dense_replace=3)
    assert set(held_out_measures(model, tokenizer, TEXTS[:2], pack(TEXTS[:4], tokenizer, 16))) == {
        "main_loss",
        "bits_per_byte",
    }


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    config = folder / "run.yaml"
    config.write_text(
        f"data: [{data}]\noutput: {folder}/out\nmodel: tiny\nvocab-size: 300\nblock: 32\nbatch: 2\nsteps: 7\n"
        "held-out: 0.2\neval-steps: 3\neval-bytes: 700\nschedule: report\nbatch-ramp: [2, 6, 12]\nlog-steps: 2\n"
        "set: {num_hidden_layers: 2}\n"
    )
    assert main(["train", "--config", str(config)]) == 0
    return folder / "out"


def test_the_folder_says_what_was_run_and_measured(trained, data):
    history = json.loads((trained / "training_log.json").read_text())
    measured = [entry for entry in history if "eval_main_loss" in entry]
    assert [entry["step"] for entry in measured] == [0, 3, 6, 7]
    names = {"eval_main_loss", "eval_bits_per_byte", "eval_mtp_acceptance_1", "eval_max_vio", "epoch", "step"}
    assert all(set(entry) == names for entry in measured)
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6, 7]
    assert measured[-1]["eval_main_loss"] < measured[0]["eval_main_loss"]
    options = read_config(str(trained / "train_config.json"))
    assert options["steps"] == 7 and options["batch-ramp"] == [2, 6, 12] and options["block"] == 32
    # The last measurement is of the model that is saved.
    model = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    files = sorted(data.glob("*.py"))
    texts = head((text for _, text in split_texts(read_texts(files), 0.2)[1]), 700)
    again = held_out_measures(model, tokenizer, texts, pack(texts, tokenizer, 32))
    assert again == pytest.approx({name: measured[-1][f"eval_{name}"] for name in again}, rel=1e-5)


def test_the_plot_has_every_curve(trained, monkeypatch):
    from matplotlib.image import imread

    from deepseek_v3.training import run_plot

    picture = imread(trained / "loss.png")
    assert picture.shape[0] > 600 and len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, 4)}) > 20
    drawn = {}
    monkeypatch.setattr(run_plot.plt, "close", lambda figure: drawn.update(axes=figure.axes))
    run_plot.plot_training(str(trained / "again.png"), json.loads((trained / "training_log.json").read_text()))
    lines = {line.get_label(): list(line.get_xdata()) for axis in drawn["axes"] for line in axis.get_lines()}
    assert lines["main: next token"] == lines["MTP: the tokens after"] == [2, 4, 6, 7]
    assert lines["main, held-out text"] == lines["held-out text"] == [0, 3, 6, 7]
    assert len(lines) == 6


def trainer_of(data, tmp_path, **settings):
    """The Trainer of a run, not started."""
    given = {"model": "tiny", "vocab_size": 300, "block": 32, "steps": 4, "held_out": 0.2, **settings}
    chosen = settled(TrainSettings(data=[str(data)], output=str(tmp_path), **given))
    texts = module.load_texts(chosen)
    tokenizer = module.make_tokenizer(chosen, texts)
    return module.make_trainer(chosen, module.make_model(chosen, tokenizer), tokenizer, texts)


def test_precision_and_optimizer_reach_the_trainer(data, tmp_path):
    plain = trainer_of(data, tmp_path)
    assert not plain.args.bf16 and not fp8_modules(plain.model)
    assert isinstance(plain.create_optimizer(), torch.optim.AdamW)
    low = trainer_of(data, tmp_path, precision="bf16", optimizer="adamw-bf16", learning_rate=0.02)
    optimizer = low.create_optimizer()
    assert low.args.bf16 and not fp8_modules(low.model) and isinstance(optimizer, AdamWBF16)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(0.02, (0.9, 0.95))}
    fp8 = trainer_of(data, tmp_path, precision="fp8", scale_fmt="ue8m0", fp8_statistics=5)
    recipe = fp8_modules(fp8.model)[0].fp8.recipe
    assert fp8.args.bf16 and (recipe.scale_fmt, recipe.statistics_interval) == ("ue8m0", 5)
    assert {p.dtype for p in fp8.model.parameters()} == {torch.float32}


def test_the_reports_schedule_starts_from_the_models_own_values(data, tmp_path):
    values = {"router_bias_update_rate": 0.01, "mtp_loss_weight": 0.6}
    trainer = trainer_of(data, tmp_path, schedule="report", overrides=values, warmup=2, batch_ramp=[1, 4, 9])
    schedule = trainer.schedule
    assert schedule.bias_update_rates == (0.01, 0.0)
    assert schedule.mtp_loss_weights == pytest.approx((0.6, 0.2))
    assert schedule.learning_rate_factor(1) == 0.5
    assert schedule.sizes[0] == 1 and schedule.sizes == sorted(schedule.sizes)


class Integration(TrainerCallback):
    """Takes TensorBoard's place: it sees what a reporting integration sees."""

    seen: list = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_what_callbacks_add_to_the_log_reaches_the_integration(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TensorBoardCallback", Integration)
    monkeypatch.setattr(module, "is_tensorboard_available", lambda: True)
    settings = TrainSettings([str(data)], str(tmp_path), "tiny", vocab_size=300, block=32, steps=2, held_out=0.2)
    settings.report_to, settings.precision, settings.fp8_statistics, settings.eval_steps = "tensorboard", "fp8", 1, 1
    result = module.train(settings)
    assert not fp8_modules(result.model)  # computes as any loaded model does
    reported = {name for logs in Integration.seen for name in logs}
    wanted = {"loss", "main_loss", "mtp_loss", "max_vio", "bias_range", "learning_rate", "fp8_gradient_underflow"}
    assert wanted | {"eval_main_loss", "eval_bits_per_byte", "eval_max_vio"} <= reported


def test_any_trainer_reports_in_the_order_of_its_callbacks(tokenizer, tmp_path):
    """With report_to=[] an integration stands where the user puts it."""
    blocks = pack(TEXTS, tokenizer, 16)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to=[], use_cpu=True)
    seen = []
    integration = Integration()
    integration.seen = seen
    RunTrainer(
        model=make_model(vocab_size=len(tokenizer)),
        args=arguments,
        train_dataset=blocks,
        callbacks=[RouterBalanceCallback(), integration],
        held_out=[],
    ).train()
    assert "max_vio" in seen[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report-to", "tensorboard"], "needs the package: pip install tensorboard"),
        (["--eval-steps", "2", "--block", "4000"], "training text: "),
        (["--eval-steps", "2", "--eval-bytes", "20", "--block", "64"], "held-out text: "),
        (["--stream", "--steps", "2", "--held-out", "0.00001", "--eval-steps", "2"], "no text is held out of"),
        (["--set", "mtp_loss_weight=-1"], "mtp_loss_weight"),
    ],
)
def test_what_only_the_data_shows_is_one_line_too(arguments, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "is_tensorboard_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    line = ["train", "--data", str(data), "--output", "out", "--model", "tiny", "--vocab-size", "300"]
    assert main([*line, "--held-out", "0.2", *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_rows_train_without_a_stream_too(tmp_path):
    rows = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = settled(TrainSettings([str(tmp_path / "rows.jsonl")], str(tmp_path / "out"), held_out=0.2))
    texts = module.load_texts(settings)
    held_out = [text for _, text in texts.held_out]
    assert 2 < len(held_out) < 20 and sorted(texts.train + held_out) == sorted(TEXTS)
    assert all(path.name.startswith("rows.jsonl#") for path, _ in texts.held_out)
