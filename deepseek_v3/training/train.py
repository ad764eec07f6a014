"""The train command: text files in, a trained model folder with tokenizer, logs and measurements out."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from ..configuration import PRESETS, preset
from ..configuration.configuration_deepseek_v3 import DeepseekV3Config
from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from .balance import RouterBalanceCallback
from .data import pack, read_texts, split_texts, text_files, train_tokenizer


@dataclass
class TrainSettings:
    """Everything `train` needs; the defaults are a few minutes of two CPU cores.

    Attributes:
        data: files and folders of text.
        output: folder for the model, the tokenizer and the logs.
        model: a preset's name, or a folder to continue from.
        overrides: configuration fields to change, with a preset.
        tokenizer: folder of a tokenizer; None trains one on the data (or takes the model folder's).
        vocab_size: of a tokenizer to be trained.
        limit_bytes: how much text to read at most.
        held_out: share of the files that is kept for evaluation.
        block: tokens in a training block.
        batch, accumulation: blocks in a forward, forwards in an optimizer step.
        steps, learning_rate, warmup, seed, bf16, activation_checkpointing: as of `TrainingArguments`.
        mask_documents: keep attention and MTP inside of documents.
        resume: continue from the newest checkpoint in `output`.
    """

    data: list[str]
    output: str
    model: str = "small"
    overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    vocab_size: int = 4096
    limit_bytes: int | None = None
    held_out: float = 0.03
    block: int = 256
    batch: int = 8
    accumulation: int = 1
    steps: int = 400
    learning_rate: float = 3e-3
    warmup: int = 40
    seed: int = 0
    bf16: bool = False
    activation_checkpointing: bool = False
    mask_documents: bool = False
    save_steps: int = 0
    resume: bool = False


@dataclass
class TrainResult:
    """What `train` leaves: the model, its tokenizer, the held-out (file, text) pairs and Trainer's log."""

    model: DeepseekV3ForCausalLM
    tokenizer: Any
    held_out: list[tuple[Path, str]]
    history: list[dict[str, Any]]


def load_data(settings: TrainSettings) -> tuple[list[str], list[tuple[Path, str]]]:
    """Training texts and held-out (file, text) pairs."""
    files = text_files(settings.data)
    return split_texts(read_texts(files, settings.limit_bytes), settings.held_out)


def make_tokenizer(settings: TrainSettings, texts: list[str]) -> Any:
    """The tokenizer of `settings.tokenizer`, of the model folder, or one trained on `texts`."""
    folder = settings.tokenizer or (settings.model if settings.model not in PRESETS else None)
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    return train_tokenizer(texts, settings.vocab_size)


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


def training_arguments(settings: TrainSettings) -> TrainingArguments:
    """AdamW with the report's betas, weight decay and clipping; cosine decay to a tenth of the learning rate."""
    return TrainingArguments(
        output_dir=settings.output,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=max(1, settings.steps // 40),
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        seed=settings.seed,
        bf16=settings.bf16,
        activation_checkpointing=settings.activation_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )


def train(settings: TrainSettings, say: Callable[[str], None] = print) -> TrainResult:
    """Train under `transformers.Trainer` with the balance callback; save model, tokenizer and `training_log.json`.

    Args:
        settings: see `TrainSettings`.
        say: takes the lines of progress that are no progress bar.

    Raises:
        ValueError, FileNotFoundError: settings that cannot work, with what to change.
    """
    if settings.model not in PRESETS and not os.path.isdir(settings.model):
        raise ValueError(f"{settings.model} is neither a preset ({', '.join(PRESETS)}) nor a folder")
    set_seed(settings.seed)
    texts, held_out = load_data(settings)
    size = sum(len(text.encode()) for text in texts)
    say(f"{len(texts)} files to train on ({size / 1e6:.1f} MB), {len(held_out)} held out")
    tokenizer = make_tokenizer(settings, texts)
    dataset = pack(texts, tokenizer, settings.block, settings.mask_documents)
    say(f"{len(tokenizer)} words; {len(dataset)} blocks of {settings.block} tokens")
    model = make_model(settings, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    blocks = settings.batch * settings.accumulation
    say(f"{parameters / 1e6:.1f} M parameters, {settings.steps} steps of {blocks} blocks")
    trainer = Trainer(
        model=model,
        args=training_arguments(settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[RouterBalanceCallback()],
    )
    trainer.train(resume_from_checkpoint=settings.resume or None)
    model.eval()
    trainer.save_model(settings.output)
    log = Path(settings.output, "training_log.json")
    log.write_text(json.dumps(trainer.state.log_history))
    return TrainResult(model, tokenizer, held_out, trainer.state.log_history)
