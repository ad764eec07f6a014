"""Group-relative policy optimisation with TRL: an adapter learns from a reward on what the model itself generates.

The report's own method of reinforcement learning (section 5.2.2). The reward here is the share of letters among the
answer's characters, which a random model can find; give yours in `reward`.

On a CPU, in a minute:  python examples/trl_grpo.py
On one GPU:             python examples/trl_grpo.py --model DIR --data prompts.jsonl --length 512 --generations 16
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from small import make_base, sums
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from deepseek_v3 import lora_target_modules


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base folder (default: a tiny one is made)")
    parser.add_argument("--data", help="JSONL with prompt, a list of messages (default: sums in words)")
    parser.add_argument("--output", default="runs/trl_grpo")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--generations", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 1e-6, 1e-2 for the tiny model")
    return parser.parse_args()


def reward(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """The share of lower-case letters; 0 for an empty answer."""
    texts = [messages[0]["content"] for messages in completions]
    return [sum("a" <= c <= "z" for c in text) / max(1, len(text)) for text in texts]


def main() -> None:
    args = parse()
    output = Path(args.output)
    folder = args.model or make_base(output / "base")
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question, _ in sums()])
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if on_gpu else torch.float32, device_map={"": 0} if on_gpu else None
    )
    targets = lora_target_modules(model.config, "all")
    arguments = GRPOConfig(
        output_dir=str(output),
        max_completion_length=args.length,
        num_generations=args.generations,
        max_steps=args.steps,
        per_device_train_batch_size=2 * args.generations,
        learning_rate=args.learning_rate or (1e-6 if args.model else 1e-2),
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        activation_checkpointing=on_gpu,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        reward_funcs=reward,
        train_dataset=load_dataset("json", data_files=args.data, split="train") if args.data else prompts,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, **targets),
    )
    trainer.train()
    trainer.model.save_pretrained(output / "adapter")
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward {rewards[0]:.3f} to {rewards[-1]:.3f}; adapter in {output / 'adapter'}")


if __name__ == "__main__":
    main()
