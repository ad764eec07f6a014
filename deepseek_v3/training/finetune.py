"""The finetune command: a model folder and data in, an adapter (or a whole model) with its summary and card out.

Special about it: a merged model is made from the base's own weights, read again in BF16, and the adapter; so an
adapter that was trained over FP8 or 4-bit weights is added to what the checkpoint holds, and rounded once.
"""

import importlib.util
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from ..quantization import FP8Config, is_fp8
from .balance import ROUTER_BIAS_FILE, RouterBalanceCallback, load_router_bias, save_router_bias
from .checkpoints import newest_checkpoint
from .checks import base_fingerprint, check_base, check_dtypes, save_fingerprint
from .finetune_data import LONG, PaddingCollator, load_files, prepare
from .lora import PRESETS, lora_target_modules, named_targets
from .report import plot_losses

METHODS = ("lora", "qlora", "full")
MERGES = ("bf16", "fp8")


@dataclass
class FinetuneSettings:
    """Everything `finetune` needs.

    Attributes:
        model: folder of the base model with its tokenizer.
        data: JSON, JSONL, Parquet or text files, of one kind.
        output: folder for the adapter or model, summary.json, loss.png and README.md.
        method: "lora" (FP8 bases stay FP8), "qlora" (linears and routed experts in 4-bit by bitsandbytes) or "full".
        targets: a preset of `lora_target_modules`, or ends of weights' names; empty: "all".
        rank, alpha: of the adapter, its changes scaled by alpha / rank.
        adapter: folder of an adapter to go on with, instead of a new one.
        merge: "bf16" or "fp8" also writes the merged model, in the official layout, to `output`/merged.
        eval_data: files like `data` that are not learnt: their loss is measured before, during and after training.
        max_length: tokens in a document, and in a packed row.
        long_documents: "cut" leaves out what goes beyond, "split" makes documents of it (for texts; of a conversation
            the later parts lack their beginning).
        packing: join documents into rows.
        stream: read the data while training; needs `steps`.
        epochs, steps: how long; steps where given.
        batch, accumulation, learning_rate, warmup, seed, activation_checkpointing, save_steps: as of
            `TrainingArguments`; warmup is in steps.
        dtype: "float32" or "bfloat16" for the weights that are not quantised; empty: float32 where all are trained
            (with BF16 products on a GPU), else bfloat16.
        router_bias_rate: gamma of the routers' balance; 0 leaves the biases as the base has them.
        resume: continue from the newest checkpoint in `output`.
    """

    model: str
    data: list[str]
    output: str
    method: str = "lora"
    targets: list[str] = field(default_factory=list)
    rank: int = 16
    alpha: int = 32
    adapter: str | None = None
    merge: str | None = None
    eval_data: list[str] = field(default_factory=list)
    max_length: int = 2048
    long_documents: str = "cut"
    packing: bool = True
    stream: bool = False
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 1
    accumulation: int = 8
    learning_rate: float = 2e-4
    warmup: int = 10
    seed: int = 0
    dtype: str = ""
    activation_checkpointing: bool = False
    router_bias_rate: float = 0.0
    save_steps: int = 0
    resume: bool = False


def check_settings(settings: FinetuneSettings) -> None:
    """Raise ValueError or FileNotFoundError for settings that cannot work, before anything is loaded."""
    if not os.path.isfile(os.path.join(settings.model, "config.json")):
        raise FileNotFoundError(f"{settings.model} is no model folder (it has no config.json); train or convert one")
    choices: dict[str, tuple[Any, ...]] = {"method": METHODS, "merge": (None, *MERGES), "long_documents": LONG}
    choices["dtype"] = ("", "float32", "bfloat16")
    for name, known in choices.items():
        if getattr(settings, name) not in known:
            raise ValueError(
                f"{name} = {getattr(settings, name)!r}: choose {' or '.join(map(str, filter(None, known)))}"
            )
    if settings.method == "full" and (settings.adapter or settings.targets):
        raise ValueError("method 'full' trains every weight: leave --adapter and --targets out, or choose lora")
    if settings.adapter and settings.targets:
        raise ValueError(f"the adapter {settings.adapter} has its own targets: leave --targets out")
    if settings.stream and not settings.steps:
        raise ValueError("a stream has no known length: give --steps with --stream")
    if settings.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("method 'qlora' needs bitsandbytes: pip install bitsandbytes, or choose lora")


def load_base(settings: FinetuneSettings) -> Any:
    """The base model as the method wants it: FP8 kept, in 4-bit, or widened."""
    fp8 = _is_fp8(settings.model)
    options: dict[str, Any] = {"dtype": _dtype(settings)}
    if settings.method == "qlora":
        options["quantization_config"] = _four_bit(_dtype(settings))
    elif fp8:
        options["quantization_config"] = FP8Config(keep=settings.method == "lora")
    if torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return AutoModelForCausalLM.from_pretrained(settings.model, **options)


def _is_fp8(folder: str) -> bool:
    return is_fp8(getattr(AutoConfig.from_pretrained(folder), "quantization_config", None))


def _dtype(settings: FinetuneSettings) -> torch.dtype:
    name = settings.dtype or ("float32" if settings.method == "full" else "bfloat16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _four_bit(compute: torch.dtype) -> Any:
    """NF4 with double quantisation, as of the QLoRA paper."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def with_adapter(base: Any, settings: FinetuneSettings) -> Any:
    """The base under a new adapter, or under the one of `settings.adapter`."""
    if settings.adapter:
        return continue_adapter(base, settings.adapter)
    names = settings.targets or ["all"]
    targets: dict[str, Any]
    if len(names) == 1 and names[0] in PRESETS:
        targets = lora_target_modules(base.config, names[0])
    else:
        targets = named_targets(base, names)
    config = LoraConfig(task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, **targets)
    return get_peft_model(base, config)


def continue_adapter(base: Any, folder: str) -> Any:
    """The base under a saved adapter that goes on learning.

    Raises:
        FileNotFoundError: no adapter lies there.
        ValueError: its tensors are not those that the base takes.
    """
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise FileNotFoundError(f"{folder} is no adapter folder (it has no adapter_config.json)")
    config, weights = PeftConfig.from_pretrained(folder), load_peft_weights(folder, device="cpu")
    config.inference_mode = False
    other = f"the adapter {folder} is of another base ({config.base_model_name_or_path}): "
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ValueError(f"{other}{error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(f"{other}{name} has shape {given.get(name)} there and {wanted.get(name)} here")
    check_base(base, folder)
    set_peft_model_state_dict(model, weights)
    if os.path.isfile(os.path.join(folder, ROUTER_BIAS_FILE)):
        load_router_bias(model, folder)
    return model


def _resumed(settings: FinetuneSettings, say: Callable[[str], None]) -> str | None:
    if not settings.resume:
        return None
    found = newest_checkpoint(settings.output, say)
    if found is None:
        raise ValueError(f"{settings.output} holds no complete checkpoint to resume from: leave --resume out")
    return str(found)


def training_arguments(settings: FinetuneSettings) -> TrainingArguments:
    """AdamW without weight decay, a cosine to a tenth of the learning rate, clipping at 1."""
    return TrainingArguments(
        output_dir=settings.output,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup,
        max_grad_norm=1.0,
        logging_steps=1 if (settings.steps or 100) < 100 else 10,
        eval_strategy="steps" if settings.eval_data else "no",
        eval_steps=0.1,
        eval_on_start=bool(settings.eval_data),
        per_device_eval_batch_size=settings.batch,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        seed=settings.seed,
        bf16=settings.method == "full" and torch.cuda.is_available(),
        activation_checkpointing=settings.activation_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
    )


def finetune(settings: FinetuneSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train under `transformers.Trainer`, and leave adapter or model, summary.json, loss.png and README.md.

    Of several processes (torchrun) the first alone writes.

    Args:
        settings: see `FinetuneSettings`.
        say: takes the lines of progress that are no progress bar.

    Returns:
        What summary.json holds.

    Raises:
        ValueError, FileNotFoundError: settings, data or an adapter that cannot work, with what to change.
    """
    check_settings(settings)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    counts: Counter[str] = Counter()
    dataset, evaluated = datasets_of(settings, tokenizer, counts)
    summary: dict[str, Any] = {"method": settings.method, "base": settings.model, "data": settings.data}
    summary |= {} if settings.stream else _counted(dataset, counts)
    base = load_base(settings)
    fingerprint = base_fingerprint(base)
    model = base if settings.method == "full" else with_adapter(base, settings)
    check_dtypes(model)
    summary |= _parameters(model)
    say(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in summary.items()))
    _say_lost(settings, counts, say)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = Trainer(
        model=model,
        args=training_arguments(settings),
        train_dataset=dataset,
        eval_dataset=evaluated,
        data_collator=PaddingCollator(pad),
        processing_class=tokenizer,
        callbacks=[RouterBalanceCallback(settings.router_bias_rate)],
    )
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=_resumed(settings, say))
    summary |= _measured(trainer, time.monotonic() - start)
    if settings.stream:
        summary |= counts
        _say_lost(settings, counts, say)
    trainer.save_model(settings.output)
    if not trainer.is_world_process_zero():
        return summary
    plot_losses(os.path.join(settings.output, "loss.png"), trainer.state.log_history)
    if settings.method != "full":
        save_fingerprint(fingerprint, settings.output)
    if settings.method != "full" and settings.router_bias_rate:
        save_router_bias(model, settings.output)
    if settings.merge:
        del trainer, base, model
        summary |= merge(settings, tokenizer)
    _write_folder(settings, summary)
    say(f"{settings.output}: loss {summary['first_loss']:.3f} to {summary['last_loss']:.3f}")
    return summary


def datasets_of(settings: FinetuneSettings, tokenizer: Any, counts: Counter[str]) -> tuple[Any, Any]:
    """What is learnt, counted in `counts`, and what is only measured (None without `eval_data`)."""
    how = (settings.max_length, settings.packing, settings.long_documents)
    learnt = prepare(load_files(settings.data, settings.stream), tokenizer, *how, counts)
    if not settings.eval_data:
        return learnt, None
    try:
        return learnt, prepare(load_files(settings.eval_data, option="--eval-data"), tokenizer, *how)
    except ValueError as error:
        raise ValueError(f"--eval-data {', '.join(settings.eval_data)}: {error}") from error


def _say_lost(settings: FinetuneSettings, counts: Counter[str], say: Callable[[str], None]) -> None:
    """What of the documents is not learnt as it was given."""
    long, total, left_out = (counts[name] for name in ("long_documents", "documents", "documents_left_out"))
    if long and settings.long_documents == "cut":
        say(
            f"{long} of {total} documents are longer than {settings.max_length} tokens and were cut: raise "
            "--max-length or choose --long-documents split"
        )
    if left_out:
        say(f"{left_out} of {total} documents have nothing to learn in what is kept of them, and were left out")


def _counted(dataset: Any, counts: Counter[str]) -> dict[str, int]:
    rows, tokens, learnt = 0, 0, 0
    for labels in dataset["labels"]:
        rows, tokens = rows + 1, tokens + len(labels)
        learnt += sum(label >= 0 for label in labels)
    return {**counts, "rows": rows, "tokens": tokens, "learnt_tokens": learnt}


def _parameters(model: Any) -> dict[str, int]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained_parameters": trained, "parameters": sum(p.numel() for p in model.parameters())}


def _measured(trainer: Trainer, seconds: float) -> dict[str, Any]:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    last = [entry for entry in history if "main_loss" in entry][-1]
    measured = {"steps": trainer.state.global_step, "first_loss": losses[0], "last_loss": losses[-1]}
    measured |= {name: last[name] for name in ("main_loss", "mtp_loss", "max_vio") if name in last}
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    measured |= {"first_eval_loss": held_out[0], "last_eval_loss": held_out[-1]} if held_out else {}
    measured["seconds"] = round(seconds, 1)
    if torch.cuda.is_available():
        measured["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return measured


def merge(settings: FinetuneSettings, tokenizer: Any) -> dict[str, Any]:
    """Write `output`/merged, the base in BF16 with the adapter in it, or what was trained whole; as BF16 or FP8."""
    folder, fp8 = Path(settings.output, "merged"), _is_fp8(settings.model)
    if settings.method == "full":
        merged = AutoModelForCausalLM.from_pretrained(settings.output, dtype=torch.bfloat16)
    else:
        options = {"quantization_config": FP8Config(keep=False)} if fp8 else {}
        base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16, **options)
        model: Any = PeftModel.from_pretrained(base, settings.output)
        if Path(settings.output, ROUTER_BIAS_FILE).is_file():
            load_router_bias(model, settings.output)
        merged = model.merge_and_unload()
    tokenizer.save_pretrained(folder)
    if settings.merge == "bf16":
        merged.save_pretrained(folder)
        return {"merged": str(folder)}
    merged.save_pretrained(folder, quantize="fp8", original=settings.model)
    return {"merged": str(folder), "rounding": merged.rounding_report.text()}


def _write_folder(settings: FinetuneSettings, summary: dict[str, Any]) -> None:
    folder = Path(settings.output)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(settings, summary), encoding="utf-8")


def model_card(settings: FinetuneSettings, summary: dict[str, Any]) -> str:
    """The README.md of the output folder: what it is of, how it was made, how to load it."""
    adapter = settings.method != "full"
    head = {"library_name": "peft" if adapter else "transformers", "base_model": settings.model}
    head |= {"pipeline_tag": "text-generation"}
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
    shown = {name: value for name, value in summary.items() if not isinstance(value, list)}
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in shown.items())
    return (
        f"---\n{front}\ntags: [deepseek_v3, {settings.method}]\n---\n\n"
        f"# {Path(settings.output).resolve().name}\n\n"
        f"{'LoRA adapter' if adapter else 'Fine-tuned model'}, made with `deepseek-v3 finetune --method "
        f"{settings.method}`. {_losses_are_of(settings)}\n\n"
        f"| | |\n|---|---|\n{rows}\n\n![training loss](loss.png)\n\n```python\n{_usage(settings)}```\n"
    )


def _losses_are_of(settings: FinetuneSettings) -> str:
    names = [", ".join(Path(name).name for name in files) for files in (settings.data, settings.eval_data)]
    held_out = f"the eval loss is on {names[1]}, which was not learnt. " if names[1] else ""
    return f"The loss is of training, on {names[0]}; {held_out}" + ("" if held_out else "nothing else was measured.")


def _usage(settings: FinetuneSettings) -> str:
    lines = ["import deepseek_v3", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{settings.output}")')
    if settings.method == "full":
        return "\n".join([*lines, f'model = AutoModelForCausalLM.from_pretrained("{settings.output}")', ""])
    lines.insert(1, "from peft import PeftModel")
    lines.append(f'base = AutoModelForCausalLM.from_pretrained("{settings.model}")')
    lines.append(f'model = PeftModel.from_pretrained(base, "{settings.output}")')
    if settings.router_bias_rate:
        lines.insert(1, "from deepseek_v3.training.balance import load_router_bias")
        lines.append(f'load_router_bias(model, "{settings.output}")')
    return "\n".join([*lines, ""])
