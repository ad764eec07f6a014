"""The commands of this folder: `train`, `generate`, `demo`."""

import argparse
from typing import Any

from .finetune_command import add_commands as add_finetune


def add_commands(commands: Any) -> None:
    """Add the commands to an argparse sub-parser collection; each sets `func(args) -> int`."""
    _add_train(commands)
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


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model on text files",
        description="Pre-train a preset, or go on with a model folder, on files and folders of text, under "
        "transformers' Trainer with router balancing and MTP. Example: deepseek-v3 train --data notes/ --output "
        "runs/notes --steps 1000",
    )
    train.add_argument("--data", nargs="+", required=True, metavar="PATH", help="text files, folders of .txt .py .md")
    train.add_argument(
        "--output", required=True, help="folder for model, tokenizer, checkpoints and training_log.json"
    )
    train.add_argument(
        "--model", default="small", help="preset, or a model folder to go on with (default: %(default)s)"
    )
    train.add_argument("--tokenizer", help="tokenizer folder (default: the model folder's, or a new one)")
    train.add_argument("--vocab-size", type=int, default=4096, help="of a new tokenizer (default: %(default)s)")
    train.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="configuration fields, as JSON values"
    )
    train.add_argument("--limit-bytes", type=int, help="read at most so much text")
    train.add_argument(
        "--held-out", type=float, default=0.03, help="share of files not trained on (default: %(default)s)"
    )
    train.add_argument("--block", type=int, default=256, help="tokens in a block (default: %(default)s)")
    train.add_argument("--batch", type=int, default=8, help="blocks in a forward (default: %(default)s)")
    train.add_argument("--accumulation", type=int, default=1, help="forwards in a step (default: %(default)s)")
    train.add_argument("--steps", type=int, default=400, help="optimizer steps (default: %(default)s)")
    train.add_argument("--learning-rate", type=float, default=3e-3, help="peak (default: %(default)s)")
    train.add_argument("--warmup", type=int, default=40, help="steps of warm-up (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train.add_argument("--bf16", action="store_true", help="train in BF16 mixed precision")
    train.add_argument("--activation-checkpointing", action="store_true", help="recompute layers in the backward")
    train.add_argument("--mask-documents", action="store_true", help="keep attention and MTP inside of documents")
    train.add_argument("--save-steps", type=int, default=0, help="checkpoint every so many steps (default: none)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    train.set_defaults(func=_train)


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


def _settings_of(pairs: list[str]) -> dict[str, Any]:
    import json

    settings = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--set {pair}: write FIELD=VALUE")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _train(args: argparse.Namespace) -> int:
    from .train import TrainSettings, train

    names: list[str] = [
        "data",
        "output",
        "model",
        "tokenizer",
        "vocab_size",
        "limit_bytes",
        "held_out",
        "block",
        "batch",
    ]
    names += ["accumulation", "steps", "learning_rate", "warmup", "seed", "bf16", "activation_checkpointing"]
    names += ["mask_documents", "save_steps", "resume"]
    train(TrainSettings(overrides=_settings_of(args.set), **{name: getattr(args, name) for name in names}))
    return 0


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
