"""QLoRA: a base in 4-bit NF4, routed experts included, LoRA on the experts (or more), plain PEFT and Trainer.

On a CPU, in seconds:   python examples/qlora_experts.py
On one GPU:             python examples/qlora_experts.py --model DIR --data chat.jsonl --length 2048 --accumulation 16
                        (DIR: official files in FP8 or BF16; they are packed as they are read)
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from small import make_base, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from deepseek_v3 import RouterBalanceCallback, lora_target_modules
from deepseek_v3.training.finetune_data import PaddingCollator, load_files, prepare


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base folder (default: a tiny one is made)")
    parser.add_argument("--data", help="JSONL with messages (default: sums in words)")
    parser.add_argument("--output", default="runs/qlora_experts")
    parser.add_argument("--preset", default="experts", choices=["attention", "experts", "all"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 2e-4, 2e-2 for the tiny model")
    return parser.parse_args()


def main() -> None:
    args = parse()
    output = Path(args.output)
    folder = args.model or make_base(output / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_files([args.data or write_chats(output / "sums.jsonl")])
    dataset = prepare(rows, tokenizer, args.length)

    on_gpu = torch.cuda.is_available()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=four_bit, device_map={"": 0} if on_gpu else None
    )
    print(f"base: {base.get_memory_footprint() / 1e6:,.1f} MB")
    targets = lora_target_modules(base.config, args.preset)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, **targets))
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=args.steps,
        per_device_train_batch_size=1 if args.model else 4,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate or (2e-4 if args.model else 2e-2),
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        activation_checkpointing=True,
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=PaddingCollator(tokenizer.pad_token_id or tokenizer.eos_token_id),
        callbacks=[RouterBalanceCallback(update_rate=0)],
    )
    trainer.train()
    model.save_pretrained(output / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; adapter in {output / 'adapter'}")
    if on_gpu:
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
