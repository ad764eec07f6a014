"""Pre-training goes on with all three products of every linear layer and expert in FP8, under Trainer, and is saved in
the official FP8 layout; weights that training left alone keep their codes.

On a CPU, in a minute:  python examples/continue_pretraining_fp8.py
On one GPU:             python examples/continue_pretraining_fp8.py --model DIR --data notes/*.txt --length 4096
                        (DIR: an official FP8 or BF16 folder; master weights are float32 with --master float32)
"""

import argparse
from pathlib import Path

import torch
from small import make_base, sums
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from deepseek_v3 import FP8Config, RouterBalanceCallback, disable_fp8_training, enable_fp8_training
from deepseek_v3.quantization import is_fp8
from deepseek_v3.training.finetune_data import PaddingCollator, load_files, prepare


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base folder (default: a tiny one is made)")
    parser.add_argument("--data", nargs="+", help="text files (default: sums in words)")
    parser.add_argument("--output", default="runs/continue_pretraining_fp8")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--master", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 2e-5, 5e-3 for the tiny model")
    return parser.parse_args()


def write_text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(f"{question} is {answer}" for question, answer in sums()))
    return path


def main() -> None:
    args = parse()
    output = Path(args.output)
    folder = args.model or make_base(output / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = args.data or [write_text(output / f"text{i}.txt") for i in range(2)]
    texts = load_files(files)
    if args.data is None:
        lines = [line for row in texts for line in row["text"].splitlines()]
        texts = type(texts).from_dict({"text": lines})
    dataset = prepare(texts, tokenizer, args.length)

    fp8 = is_fp8(getattr(AutoConfig.from_pretrained(folder), "quantization_config", None))
    options = {"quantization_config": FP8Config(keep=False)} if fp8 else {}
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.master), device_map={"": 0} if on_gpu else None, **options
    )
    enable_fp8_training(model)

    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate or (2e-5 if args.model else 5e-3),
        adam_beta2=0.95,
        weight_decay=0.1,
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        bf16=on_gpu and args.master == "float32",
        activation_checkpointing=on_gpu,
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=PaddingCollator(tokenizer.pad_token_id or tokenizer.eos_token_id),
        callbacks=[RouterBalanceCallback()],
    )
    trainer.train()
    disable_fp8_training(model)
    model.eval().save_pretrained(output / "fp8", quantize="fp8", original=folder)
    tokenizer.save_pretrained(output / "fp8")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; FP8 checkpoint in {output / 'fp8'}")


if __name__ == "__main__":
    main()
