"""Supervised fine-tuning with TRL: an adapter on every projection, or all weights with products in FP8 (--fp8).

TRL's own loss knows the next token alone. One line gives its trainer the model's loss, which the MTP modules and the
experts' balance are part of.

On a CPU, in seconds:   python examples/trl_sft.py [--fp8]
On one GPU:             python examples/trl_sft.py --model DIR --data chat.jsonl --length 4096 --accumulation 16
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from small import make_base, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

from deepseek_v3 import RouterBalanceCallback, disable_fp8_training, enable_fp8_training, lora_target_modules


class ModelLossTrainer(SFTTrainer):
    """TRL's data and arguments, the model's loss."""

    compute_loss = Trainer.compute_loss


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base folder (default: a tiny one is made)")
    parser.add_argument("--data", help="JSONL with messages (default: sums in words)")
    parser.add_argument("--output", default="runs/trl_sft")
    parser.add_argument("--fp8", action="store_true", help="train every weight, with products in FP8")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 2e-4, 1e-2 for the tiny model")
    return parser.parse_args()


def main() -> None:
    args = parse()
    output = Path(args.output)
    folder = args.model or make_base(output / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = args.data or str(write_chats(output / "sums.jsonl"))
    on_gpu = torch.cuda.is_available()
    dtype = torch.float32 if args.fp8 or not on_gpu else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": 0} if on_gpu else None)
    adapter = None
    if args.fp8:
        enable_fp8_training(model)
    else:
        targets = lora_target_modules(model.config, "all")
        adapter = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, **targets)
    arguments = SFTConfig(
        output_dir=str(output),
        max_length=args.length,
        assistant_only_loss=True,  # the chat template marks what the assistant says
        max_steps=args.steps,
        per_device_train_batch_size=1 if args.model else 8,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate or (2e-4 if args.model else 1e-2),
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        activation_checkpointing=on_gpu,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
    )
    trainer = ModelLossTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[RouterBalanceCallback(update_rate=0)],
    )
    trainer.train()
    if args.fp8:
        disable_fp8_training(model)
    trainer.model.save_pretrained(output / "trained")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"mtp loss {logged[0]['mtp_loss']:.3f} to {logged[-1]['mtp_loss']:.3f}")
    print(f"loss {logged[0]['loss']:.3f} to {logged[-1]['loss']:.3f}; saved in {output / 'trained'}")


if __name__ == "__main__":
    main()
