"""The commands of this folder: `train`, `distill`, `generate`, `finetune`, `demo`."""

import argparse
from typing import Any

from .distill_command import add_command as add_distill
from .finetune_command import add_commands as add_finetune
from .generate_command import add_command as add_generate
from .train_command import add_commands as add_train


def add_commands(commands: Any) -> None:
    """Add the commands to an argparse sub-parser collection; each sets `func(args) -> int`."""
    add_train(commands)
    add_distill(commands)
    add_generate(commands)
    add_finetune(commands)
    demo = commands.add_parser(
        "demo",
        help="train, save, load, complete and measure a small model on Python's standard library",
        description="The whole life of a small DeepSeek-V3 in a few minutes of two CPU cores, with nothing to "
        "download: tokenizer, training, distilling the MTP module, saving, loading, completing code, measuring. "
        "Writes report.png, report.json and a model folder that every other command takes.",
    )
    demo.add_argument("--output", default="runs/demo", help="folder for everything (default: %(default)s)")
    demo.add_argument("--steps", type=int, default=None, help="optimizer steps (default: what fits in minutes)")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.set_defaults(func=_demo)


def _demo(args: argparse.Namespace) -> int:
    from .demo import STEPS, run_demo

    run_demo(args.output, steps=STEPS if args.steps is None else args.steps, seed=args.seed)
    return 0
