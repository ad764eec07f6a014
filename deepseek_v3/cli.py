"""`deepseek-v3`, also `python -m deepseek_v3.cli`: one command for each thing the package does.

Bad input ends with one line on standard error and exit code 2. Commands that load no model import no framework that
they do not need: `inspect` reads 163 headers in less time than transformers takes to import.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from . import WITHOUT_MODELS
from .conversion.commands import add_commands as add_conversion_commands
from .training.commands import add_commands as add_training_commands


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="deepseek-v3",
        description="DeepSeek-V3 for Hugging Face: train, generate, convert and inspect models of that architecture.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Those of the first kind load models.
    for add_commands, registers in ((add_training_commands, True), (add_conversion_commands, False)):
        known = set(commands.choices)
        add_commands(commands)
        for name in commands.choices.keys() - known:
            commands.choices[name].set_defaults(registers=registers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    # Where it is installed, transformers imports it, and it speaks of kernels that no command here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if args.registers:
            os.environ.pop(WITHOUT_MODELS, None)
            from .registration import register

            register()
        code: int = args.func(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever reads (head, a pager) has seen enough; what is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"deepseek-v3 {args.command}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"deepseek-v3 {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
