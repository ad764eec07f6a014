"""The commands of this folder: `train`, `generate`, `finetune`, `demo`."""

import argparse
from typing import Any

from .finetune_command import add_commands as add_finetune
from .train_command import add_commands as add_train


def add_commands(commands: Any) -> None:
    """Add the commands to an argparse sub-parser collection; each sets `func(args) -> int`."""
    add_train(commands)
    _add_generate(commands)
    add_finetune(commands)
    demo = commands.add_parser(
        "demo",
        help="train, save, load, complete and measure a small model on Python's standard library",
        description="The whole life of a small DeepSeek-V3 in a few minutes of two CPU cores, with nothing to "
        "download: tokenizer, training, saving, loading, completing code, measuring. Writes report.png, report.json "
        "and a model folder that every other command takes.",
    )
    demo.add_argument("--output", default="runs/demo", help="folder for everything (default: %(default)s)")
    demo.add_argument("--steps", type=int, default=None, help="optimizer steps (default: what fits in minutes)")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.set_defaults(func=_demo)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="complete prompts with a model folder",
        description="Complete each prompt with pipeline('text-generation'). Example: deepseek-v3 generate --model "
        "runs/demo --prompt 'def main('",
    )
    generate.add_argument("--model", required=True, help="model folder")
    generate.add_argument("--prompt", nargs="+", required=True, help="one completion for each")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="with a temperature (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    generate.set_defaults(func=_generate)


def _generate(args: argparse.Namespace) -> int:
    import os

    if not os.path.isfile(os.path.join(args.model, "config.json")):
        raise FileNotFoundError(f"{args.model} is no model folder (it has no config.json); train or convert one")
    from transformers import pipeline, set_seed

    set_seed(args.seed)
    generate = pipeline("text-generation", model=args.model)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    for prompt in args.prompt:
        print(generate(prompt, max_new_tokens=args.max_new_tokens, **sampling)[0]["generated_text"])
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import STEPS, run_demo

    run_demo(args.output, steps=STEPS if args.steps is None else args.steps, seed=args.seed)
    return 0
