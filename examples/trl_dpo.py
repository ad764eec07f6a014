"""Direct preference optimisation with TRL: an adapter learns to prefer right sums over wrong ones.

The reference is the base itself, its adapter switched off. The loss is over the next token alone, as DPO defines it:
the MTP modules stay as the base has them, and `router_aux_loss_coef` (off here) would add the experts' balance.

On a CPU, in seconds:   python examples/trl_dpo.py
On one GPU:             python examples/trl_dpo.py --model DIR --data pairs.jsonl --length 2048 --accumulation 16
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from small import NUMBERS, make_base, sums
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from deepseek_v3 import lora_target_modules


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base folder (default: a tiny one is made)")
    parser.add_argument("--data", help="JSONL with prompt, chosen and rejected (default: sums in words)")
    parser.add_argument("--output", default="runs/trl_dpo")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 5e-6, 5e-3 for the tiny model")
    return parser.parse_args()


def make_pairs() -> Dataset:
    """Each sum with its answer, and with another number."""
    rows = []
    for question, answer in sums():
        other = NUMBERS[(NUMBERS.index(answer) + 3) % len(NUMBERS)]
        turns = [[{"role": role, "content": text}] for role, text in (("user", question), ("assistant", answer))]
        rejected = [{"role": "assistant", "content": other}]
        rows.append({"prompt": turns[0], "chosen": turns[1], "rejected": rejected})
    return Dataset.from_list(rows)


def main() -> None:
    args = parse()
    output = Path(args.output)
    folder = args.model or make_base(output / "base")
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if on_gpu else torch.float32, device_map={"": 0} if on_gpu else None
    )
    targets = lora_target_modules(model.config, "all")
    arguments = DPOConfig(
        output_dir=str(output),
        max_length=args.length,
        max_steps=args.steps,
        per_device_train_batch_size=1 if args.model else 8,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate or (5e-6 if args.model else 5e-3),
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        activation_checkpointing=on_gpu,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
    )
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=args.data, split="train") if args.data else make_pairs(),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, **targets),
    )
    trainer.train()
    trainer.model.save_pretrained(output / "adapter")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    margins = [entry["rewards/margins"] for entry in (logged[0], logged[-1])]
    print(f"margin {margins[0]:.3f} to {margins[1]:.3f}")
    print(f"loss {logged[0]['loss']:.3f} to {logged[-1]['loss']:.3f}; adapter in {output / 'adapter'}")


if __name__ == "__main__":
    main()
