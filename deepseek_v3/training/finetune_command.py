"""The `finetune` command's arguments."""

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `finetune` to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a model folder by LoRA, QLoRA or whole",
        description="Fine-tune on conversations (column messages), prompts with completions, or texts, MTP modules "
        "included. Example: deepseek-v3 finetune --model DIR --data chat.jsonl --output runs/chat --merge fp8",
    )
    parser.add_argument("--model", required=True, help="folder of the base model and its tokenizer")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSON, JSONL, Parquet or text")
    parser.add_argument("--output", required=True, help="folder for the adapter, its card, summary and loss curve")
    parser.add_argument("--method", default="lora", help="lora, qlora or full (default: %(default)s)")
    parser.add_argument(
        "--targets", nargs="+", default=[], help="attention, experts, all, or weights' names (default: all)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: %(default)s)")
    parser.add_argument(
        "--alpha", type=int, default=32, help="changes are scaled by alpha / rank (default: %(default)s)"
    )
    parser.add_argument("--adapter", help="folder of an adapter to go on with")
    parser.add_argument("--merge", help="bf16 or fp8: also write the merged model to OUTPUT/merged")
    parser.add_argument(
        "--eval-data", nargs="+", default=[], metavar="FILE", help="not learnt: its loss is measured along the way"
    )
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--long-documents", default="cut", help="cut or split what is longer (default: %(default)s)")
    parser.add_argument("--no-packing", dest="packing", action="store_false", help="one document a row, padded")
    parser.add_argument("--stream", action="store_true", help="read the data while training; needs --steps")
    parser.add_argument("--epochs", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="optimizer steps, in place of epochs")
    parser.add_argument("--batch", type=int, default=1, help="rows in a forward (default: %(default)s)")
    parser.add_argument("--accumulation", type=int, default=8, help="forwards in a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="peak (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="steps of warm-up (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16 (default: float32 for full, else bfloat16)")
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute layers in the backward")
    parser.add_argument(
        "--router-bias-rate", type=float, default=0.0, help="0 leaves the routers' biases alone (default: %(default)s)"
    )
    parser.add_argument("--save-steps", type=int, default=0, help="checkpoint every so many steps (default: none)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.set_defaults(func=_finetune)


def _finetune(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from .finetune import FinetuneSettings, finetune

    finetune(FinetuneSettings(**{field.name: getattr(args, field.name) for field in fields(FinetuneSettings)}))
    return 0
