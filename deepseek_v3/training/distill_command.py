"""The `distill` command's arguments."""

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    """Add `distill` to an argparse sub-parser collection; it sets `func(args) -> int`."""
    parser = commands.add_parser(
        "distill",
        help="let a trained model's MTP modules learn to draft what it writes",
        description="Train nothing but the MTP modules of a model folder, on what the main model itself writes after "
        "prompts from texts, so that more drafts are accepted; plain decoding stays as it is. "
        "Example: deepseek-v3 distill --model runs/notes --data notes/ --output runs/notes-fast",
    )
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="as of train: prompts are cut from it"
    )
    parser.add_argument(
        "--output", required=True, help="folder for the whole model, its tokenizer and distill_log.json"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.03,
        help="share of files that no prompt is cut from; as in training, it is the same ones (default: %(default)s)",
    )
    parser.add_argument("--rows", type=int, default=256, help="prompts (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="written after each (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the writing; 0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--depth", type=int, default=3, help="drafts to learn from a token (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=20, help="steps of warm-up (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.set_defaults(func=_distill)


def _distill(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from .distill import DistillSettings, distill

    distill(DistillSettings(**{field.name: getattr(args, field.name) for field in fields(DistillSettings)}))
    return 0
