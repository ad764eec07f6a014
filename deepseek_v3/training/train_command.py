"""The `train` command's parser, made from the fields of `TrainSettings`."""

import argparse
import json
from dataclasses import MISSING, fields
from typing import Any

from .train_settings import TrainSettings, make_settings, option_name, option_types, read_config


def add_commands(commands: Any) -> None:
    """Add `train` to an argparse sub-parser collection."""
    parser = commands.add_parser(
        "train",
        help="train a model on text files",
        description="Pre-train a preset, or go on with a model folder, on texts, under transformers' Trainer with "
        "router balancing and MTP. Example: deepseek-v3 train --data notes/ --output runs/notes --steps 1000",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with options by their names; those given win")
    types = option_types()
    for setting in fields(TrainSettings):
        _add_option(parser, setting, types[option_name(setting)])
    parser.set_defaults(func=_train)


def _add_option(parser: Any, setting: Any, kind: Any) -> None:
    details = {name: value for name, value in setting.metadata.items() if name not in ("help", "option")}
    help_text = setting.metadata["help"]
    if setting.default not in (MISSING, None, False, ""):
        help_text += f" (default: {setting.default})"
    if kind is bool:
        details["action"] = argparse.BooleanOptionalAction
    elif kind == dict[str, Any]:
        details["nargs"] = "*"
    elif kind == list[str]:
        details["nargs"] = "+"
    elif kind == list[int] | None:
        details |= {"nargs": 3, "type": int}
    else:
        details["type"] = {int: int, int | None: int, float: float}.get(kind, str)
    parser.add_argument(f"--{option_name(setting)}", dest=option_name(setting), help=help_text, **details)


def _fields_of(pairs: list[str]) -> dict[str, Any]:
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
    given = {name: value for name, value in vars(args).items() if name in option_types()}
    if "set" in given:
        given["set"] = _fields_of(given["set"])
    settings = make_settings(read_config(args.config) if "config" in args else {}, given)
    from .train import train

    train(settings)
    return 0
