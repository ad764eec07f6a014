"""The train command: texts in; a trained model folder with tokenizer, logs, measurements and a plot out."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, is_tensorboard_available
from transformers.trainer_callback import TrainerCallback, TrainerState

from ..configuration import PRESETS, preset
from ..configuration.configuration_deepseek_v3 import DeepseekV3Config
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from .balance import RouterBalanceCallback
from .checkpoints import STATE, checkpoints, newest_checkpoint
from .data import head, pack, read_texts, split_texts, text_files, train_tokenizer
from .fp8 import AdamWBF16, FP8Recipe, FP8StatisticsCallback, disable_fp8_training, enable_fp8_training
from .run_plot import plot_training
from .run_trainer import CheckpointLogCallback, RunTrainer, ScheduledRunTrainer
from .schedules import BatchRamp, ReportSchedule
from .stream import PackedStream, StreamCallback, saved_place, stream_texts
from .train_settings import TrainSettings, as_options, settled

CONFIG, LOG, PLOT = "train_config.json", "training_log.json", "loss.png"
_BETAS = (0.9, 0.95)


@dataclass
class TrainResult:
    """What `train` leaves: the model, its tokenizer, the held-out (file, text) pairs and Trainer's log."""

    model: DeepseekV3ForCausalLM
    tokenizer: Any
    held_out: list[tuple[Path, str]]
    history: list[dict[str, Any]]


@dataclass
class Texts:
    """The training texts, or the files that are streamed; and the held-out (file, text) pairs, of a stream as many
    as are measured during the run."""

    train: list[str]
    files: list[Path]
    held_out: list[tuple[Path, str]]


def load_texts(settings: TrainSettings) -> Texts:
    """What `settings.data` holds.

    Raises:
        FileNotFoundError, ValueError: no texts, or too few to hold some out.
    """
    files = text_files(settings.data)
    if not settings.stream:
        train, held_out = split_texts(read_texts(files, settings.limit_bytes), settings.held_out)
        return Texts(train, [], held_out)
    if not settings.eval_steps:
        return Texts([], files, [])
    kept = head(stream_texts(files, settings.held_out, evaluated=True), settings.eval_bytes)
    if not kept:
        raise ValueError(f"no text is held out of {', '.join(settings.data)}: raise --held-out or add texts")
    return Texts([], files, [(Path(f"held-out-{i}"), text) for i, text in enumerate(kept)])


def make_tokenizer(settings: TrainSettings, texts: Texts, checkpoint: Path | None = None) -> Any:
    """The tokenizer of the checkpoint, of `settings.tokenizer`, of the model folder, or one trained on the texts."""
    folder = checkpoint or settings.tokenizer or (settings.model if settings.model not in PRESETS else None)
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    if not settings.stream:
        return train_tokenizer(texts.train, settings.vocab_size)
    sample = head(stream_texts(texts.files, settings.held_out, evaluated=False), settings.tokenizer_bytes)
    if not sample:
        raise ValueError(f"no text to train on in {', '.join(settings.data)}")
    return train_tokenizer(sample, settings.vocab_size)


def make_model(settings: TrainSettings, tokenizer: Any) -> DeepseekV3ForCausalLM:
    """A fresh model of a preset with the tokenizer's vocabulary, or the one in a folder."""
    if settings.model not in PRESETS:
        model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        return model
    config: DeepseekV3Config = preset(
        settings.model,
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settings.overrides,
        },
    )
    return DeepseekV3ForCausalLM(config)


def training_arguments(settings: TrainSettings, fresh: bool = True) -> TrainingArguments:
    """AdamW with the report's betas, weight decay and clipping; cosine decay to a tenth of the learning rate.

    Args:
        settings: settled.
        fresh: measure before the first step; a resumed run did.
    """
    return TrainingArguments(
        output_dir=settings.output,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup or 0,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=settings.log_steps or 500,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        eval_on_start=bool(settings.eval_steps) and fresh,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        seed=settings.seed,
        bf16=settings.precision != "fp32",
        activation_checkpointing=settings.activation_checkpointing,
        ignore_data_skip=settings.stream,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )


def make_schedule(settings: TrainSettings, config: Any, ranks: int) -> ReportSchedule:
    """The report's schedule with the model's own gamma and lambda as the first values, 0 and a third the last."""
    ramp = None
    if settings.batch_ramp is not None:
        first, last, sequences = settings.batch_ramp
        ramp = BatchRamp(first, last, sequences, multiple_of=ranks)
    gamma, weight = config.router_bias_update_rate, config.mtp_loss_weight
    return ReportSchedule(settings.steps or 0, settings.warmup, ramp, (gamma, 0.0), (weight, weight / 3))


def _callbacks(settings: TrainSettings, dataset: Any, sizes: list[int] | None) -> list[TrainerCallback]:
    """Those that add to a log stand before the one that reports it."""
    callbacks: list[TrainerCallback] = [CheckpointLogCallback(), RouterBalanceCallback()]
    if settings.precision == "fp8":
        callbacks.append(FP8StatisticsCallback())
    if settings.stream:
        callbacks.append(StreamCallback(dataset, sizes))
    if settings.report_to == "tensorboard":
        callbacks.append(TensorBoardCallback())
    return callbacks


def make_trainer(settings: TrainSettings, model: Any, tokenizer: Any, texts: Texts, fresh: bool = True) -> Trainer:
    """The Trainer of a run.

    Args:
        settings: settled.
        model: float32; put into FP8 training where the settings say so.
        tokenizer: packs the texts.
        texts: as of `load_texts`.
        fresh: whether the run begins, see `training_arguments`.
    """
    if settings.precision == "fp8":
        scale_fmt = None if settings.scale_fmt == "float32" else settings.scale_fmt
        enable_fp8_training(model, FP8Recipe(scale_fmt=scale_fmt, statistics_interval=settings.fp8_statistics))
    held_out = head((text for _, text in texts.held_out), settings.eval_bytes) if settings.eval_steps else []
    dataset = make_dataset(settings, tokenizer, texts)
    arguments = training_arguments(settings, fresh)
    schedule = None if settings.schedule == "cosine" else make_schedule(settings, model.config, arguments.world_size)
    named: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": dataset,
        "eval_dataset": _blocks(settings, held_out, tokenizer, "held-out text") if held_out else None,
        "processing_class": tokenizer,
        "callbacks": _callbacks(settings, dataset, None if schedule is None else schedule.sizes),
        "held_out": held_out,
    }
    if settings.optimizer == "adamw-bf16":
        named["optimizer_cls_and_kwargs"] = AdamWBF16, {"lr": settings.learning_rate, "betas": _BETAS}
    return RunTrainer(**named) if schedule is None else ScheduledRunTrainer(**named, schedule=schedule)


def make_dataset(settings: TrainSettings, tokenizer: Any, texts: Texts) -> Any:
    """Blocks to train on: packed at once, or as they are streamed."""
    if not settings.stream:
        return _blocks(settings, texts.train, tokenizer, "training text")
    shuffling = {"shuffle_buffer": settings.shuffle_buffer, "seed": settings.seed, "held_out": settings.held_out}
    return PackedStream(texts.files, tokenizer, settings.block, settings.mask_documents, **shuffling)  # type: ignore[arg-type]


def _blocks(settings: TrainSettings, texts: list[str], tokenizer: Any, what: str) -> Any:
    try:
        return pack(texts, tokenizer, settings.block, settings.mask_documents)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def find_checkpoint(settings: TrainSettings, say: Callable[[str], None] = print) -> Path | None:
    """Where a run goes on from; None begins it.

    Raises:
        ValueError: nothing to resume, or checkpoints of another run where this one would write its own.
    """
    if not settings.resume:
        if checkpoints(settings.output):
            raise ValueError(
                f"{settings.output} holds checkpoints of an earlier run: go on with --resume, give another --output, "
                "or delete them"
            )
        return None
    found = newest_checkpoint(settings.output, say)
    if found is not None:
        say(f"resuming from {found}")
        return found
    if not Path(settings.output, CONFIG).is_file():
        raise ValueError(f"{settings.output} holds no run to resume: leave --resume out")
    say(f"{settings.output} has no complete checkpoint: beginning again")
    return None


def _check_run(settings: TrainSettings) -> None:
    if settings.model not in PRESETS and not os.path.isdir(settings.model):
        raise ValueError(f"{settings.model} is neither a preset ({', '.join(PRESETS)}) nor a folder")
    if settings.report_to == "tensorboard" and not is_tensorboard_available():
        raise ValueError("--report-to tensorboard needs the package: pip install tensorboard, or leave it out")


def train(settings: TrainSettings, say: Callable[[str], None] = print) -> TrainResult:
    """Train under `transformers.Trainer` with the balance callback; save the model, its tokenizer,
    `train_config.json`, `training_log.json` and `loss.png`.

    Args:
        settings: see `TrainSettings`.
        say: takes the lines of progress that are no progress bar.

    Raises:
        ValueError, FileNotFoundError: settings that cannot work, with what to change.
    """
    settings = settled(settings)
    _check_run(settings)
    checkpoint = find_checkpoint(settings, say)
    set_seed(settings.seed)
    texts = load_texts(settings)
    tokenizer = make_tokenizer(settings, texts, checkpoint)
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE))
    if state is not None and state.global_step >= (settings.steps or 0):
        say(f"{checkpoint} is the run's last step: nothing is left to train")
        return _finish_from(settings, checkpoint, tokenizer, texts, state)
    model = make_model(settings, tokenizer)
    trainer = make_trainer(settings, model, tokenizer, texts, fresh=checkpoint is None)
    if state is not None and settings.stream:
        dataset: Any = trainer.train_dataset
        dataset.start = saved_place(state.stateful_callbacks, str(checkpoint))
    if trainer.is_world_process_zero():
        _say_sizes(settings, texts, trainer, say)
        _write_config(settings, say)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if settings.precision == "fp8":
        disable_fp8_training(model)
    model.eval()
    trainer.save_model(settings.output)
    if trainer.is_world_process_zero():
        _write_logs(settings, trainer.state.log_history)
    return TrainResult(model, tokenizer, texts.held_out, trainer.state.log_history)


def _finish_from(settings: TrainSettings, checkpoint: Any, tokenizer: Any, texts: Texts, state: Any) -> TrainResult:
    """Write what a run that was killed after its last checkpoint did not."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if os.environ.get("RANK", "0") == "0":
        model.save_pretrained(settings.output)
        tokenizer.save_pretrained(settings.output)
        _write_logs(settings, state.log_history)
    return TrainResult(model.eval(), tokenizer, texts.held_out, state.log_history)


def _say_sizes(settings: TrainSettings, texts: Texts, trainer: Trainer, say: Callable[[str], None]) -> None:
    if settings.stream:
        say(f"a stream of {len(texts.files)} files")
    else:
        size = sum(len(text.encode()) for text in texts.train)
        say(f"{len(texts.train)} texts to train on ({size / 1e6:.1f} MB), {len(texts.held_out)} held out")
        say(f"{len(trainer.train_dataset)} blocks of {settings.block} tokens")  # type: ignore[arg-type]
    model: Any = trainer.model
    parameters = sum(p.numel() for p in model.parameters())
    blocks = settings.batch * settings.accumulation * trainer.args.world_size
    shown = f"{blocks} blocks" if settings.batch_ramp is None else "{} to {} blocks".format(*settings.batch_ramp)
    say(
        f"{parameters / 1e6:.1f} M parameters, {len(trainer.processing_class)} words, "  # type: ignore[arg-type]
        f"{settings.steps} steps of {shown}, {settings.precision}"
    )


def _write_config(settings: TrainSettings, say: Callable[[str], None]) -> None:
    path, used = Path(settings.output, CONFIG), as_options(settings)
    if settings.resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in used if name not in ("resume", "output") and before.get(name) != used[name]]
        if changed:
            shown = ", ".join(f"{name} {before.get(name)} -> {used[name]}" for name in changed)
            say(f"other settings than the run began with, so that it will not be the same: {shown}")
    _write(path, used)


def _write_logs(settings: TrainSettings, history: list[dict[str, Any]]) -> None:
    _write(Path(settings.output, LOG), history)
    plot_training(str(Path(settings.output, PLOT)), history)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
