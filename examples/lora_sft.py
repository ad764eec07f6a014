"""Supervised fine-tuning with LoRA on every projection, the experts and the MTP modules, by plain PEFT and Trainer.

On a CPU, in seconds:   python examples/lora_sft.py
On one GPU:             python examples/lora_sft.py --model DIR --data chat.jsonl --length 4096 --accumulation 16
                        (DIR: an official FP8 or BF16 folder; FP8 weights stay FP8)
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from small import make_base, write_chats
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from deepseek_v3 import FP8Config, RouterBalanceCallback, lora_target_modules
from deepseek_v3.quantization import is_fp8
from deepseek_v3.training.finetune_data import PaddingCollator, load_files, prepare


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base folder (default: a tiny one is made)")
    parser.add_argument("--data", help="JSONL with messages (default: sums in words)")
    parser.add_argument("--output", default="runs/lora_sft")
    parser.add_argument("--preset", default="all", choices=["attention", "experts", "all"])
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
    rows = load_files([args.data or write_chats(output / "sums.jsonl")])
    dataset = prepare(rows, tokenizer, args.length)

    fp8 = is_fp8(getattr(AutoConfig.from_pretrained(folder), "quantization_config", None))
    options = {"quantization_config": FP8Config(keep=True)} if fp8 else {}
    on_gpu = torch.cuda.is_available()
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0} if on_gpu else None, **options
    )
    targets = lora_target_modules(base.config, args.preset)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, **targets))
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=args.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate or (2e-4 if args.model else 1e-2),
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
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
        callbacks=[RouterBalanceCallback(update_rate=0)],  # the base's biases stay; the logs show load and MTP loss
    )
    trainer.train()
    model.save_pretrained(output / "adapter")

    model.eval()
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "two and three"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    answer = model.generate(**question, max_new_tokens=8, do_sample=False)
    print("two and three:", tokenizer.decode(answer[0, question["input_ids"].shape[1] :], skip_special_tokens=True))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; adapter in {output / 'adapter'}")


if __name__ == "__main__":
    main()
