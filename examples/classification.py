"""Heads other than the language model's: a class a sequence, a class a token, a reward a sequence (num_labels=1).

On a CPU, in seconds:   python examples/classification.py --task sequence|token|reward
On one GPU:             python examples/classification.py --task sequence --model DIR --length 1024 --lora
                        (DIR: any folder of a causal model; the head is new, MTP modules are left out)
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small import NUMBERS, make_base, sums
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from deepseek_v3 import RouterBalanceCallback, lora_target_modules

CLASSES = {"sequence": {"num_labels": 2}, "token": {"num_labels": 2}, "reward": {"num_labels": 1}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sequence", choices=list(CLASSES))
    parser.add_argument("--model", help="base folder (default: a tiny one is made)")
    parser.add_argument("--output", default="runs/classification")
    parser.add_argument("--lora", action="store_true", help="train an adapter and the head instead of everything")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 2e-5, 3e-3 for the tiny model")
    return parser.parse_args()


def make_rows(task: str, tokenizer: Any, length: int) -> Dataset:
    """Sums with right and wrong answers (sequence, reward), or with their numbers marked word by word (token)."""
    rows = []
    for i, (question, answer) in enumerate(sums()):
        wrong = NUMBERS[(NUMBERS.index(answer) + 1 + i % 3) % 10]
        for word, right in ((answer, 1), (wrong, 0)):
            text = f"{question} is {word}"
            if task == "token":
                rows.append(mark_numbers(text, tokenizer, length))
            else:
                label = float(right) if task == "reward" else right
                rows.append({**tokenizer(text, truncation=True, max_length=length), "labels": label})
    return Dataset.from_list([{k: v for k, v in row.items() if k != "token_type_ids"} for row in rows])


def mark_numbers(text: str, tokenizer: Any, length: int) -> dict[str, Any]:
    encoded = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")
    spans, start = [], 0
    for word in text.split():
        start = text.index(word, start)
        spans.append((start, start + len(word), int(word in NUMBERS)))
        start += len(word)
    labels = [max((mark for begin, end, mark in spans if begin < b and end > a), default=0) for a, b in offsets]
    return {**encoded, "labels": labels}


def main() -> None:
    args = parse()
    output = Path(args.output)
    folder = args.model or make_base(output / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    on_gpu = torch.cuda.is_available()
    auto = AutoModelForTokenClassification if args.task == "token" else AutoModelForSequenceClassification
    model = auto.from_pretrained(
        folder,
        dtype=torch.bfloat16 if args.lora and args.model else torch.float32,
        device_map={"": 0} if on_gpu else None,
        pad_token_id=tokenizer.pad_token_id,
        **CLASSES[args.task],
    )
    if args.lora:
        kind = "TOKEN_CLS" if args.task == "token" else "SEQ_CLS"  # keeps the new head beside the adapter
        targets = lora_target_modules(model.config, "attention")
        model = get_peft_model(model, LoraConfig(task_type=kind, r=16, lora_alpha=32, **targets))

    collator = DataCollatorForTokenClassification if args.task == "token" else DataCollatorWithPadding
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=args.learning_rate or (2e-5 if args.model else 3e-3),
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        use_cpu=not on_gpu,
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=make_rows(args.task, tokenizer, args.length),
        data_collator=collator(tokenizer),
        callbacks=[RouterBalanceCallback()],
    )
    trainer.train()
    model.save_pretrained(output / args.task)
    tokenizer.save_pretrained(output / args.task)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; model in {output / args.task}")


if __name__ == "__main__":
    main()
