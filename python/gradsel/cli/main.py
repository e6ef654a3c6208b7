"""The command line: finds the command, and imports what that one needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

#: Every command with its help; the module of the same name adds its arguments.
COMMANDS = {
    "finetune": "fine-tune a pre-trained model on images or texts, and test it",
    "evaluate": "test a result of finetune, on its own or on other data",
    "predict": "classify images or texts with a result of finetune",
    "resume": "go on with a run of finetune that was stopped",
    "methods": "list the methods of finetune and their options",
    "demo": "compare GPS with other ways to fine-tune, on digits, in about a minute",
    "count": "count the parameters that the papers' settings, or one policy, train",
    "delta": "the difference that fine-tuning makes to a checkpoint: make, inspect, apply and revert it",
    "config": "which kernels are in use on this machine, and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 if something given does not fit; 2 if an optional package is missing; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(argv).parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has stopped, as in ``gradsel count | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would raise again
        return 0
    return code


class _Version(argparse.Action):
    """Prints the version, for which the kernels, and with them torch, are imported."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        print(f"gradsel {import_module('gradsel_kernels').__version__}")
        parser.exit()


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gradsel", description="Gradient-based sparse fine-tuning.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        if name == wanted:
            import_module(f"gradsel.cli.{name}").add_to(commands, text)
        else:
            commands.add_parser(name, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
