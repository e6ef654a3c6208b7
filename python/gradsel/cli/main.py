"""The command line: finds the command, and imports what that one needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from gradsel.cli.parsing import Parser
from gradsel.cli.running import TRACEBACK

#: Every command with its help; the module of the same name adds its arguments.
COMMANDS = {
    "finetune": "fine-tune a pre-trained model on images, texts or masks, and test it",
    "evaluate": "test a result of finetune, on its own or on other data",
    "predict": "classify images or texts, or segment images, with a result of finetune",
    "resume": "go on with a run of finetune that was stopped",
    "compare": "compare methods on one data set, with tuned learning rates and several seeds",
    "papers": "run the papers' tables, figures and ablations by name, beside their numbers",
    "push": "put a result of finetune, or a delta, on a model hub",
    "methods": "list the methods of finetune and their options",
    "presets": "list the papers' settings that finetune --preset takes, and where they are from",
    "demo": "fine-tune a small model on handwritten digits, without a download, in two minutes",
    "count": "count the parameters that the papers' settings, or one policy, train",
    "delta": "what fine-tuning changes in a checkpoint: make, inspect, apply and revert it",
    "config": "which kernels are in use on this machine, and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 if something given does not fit; 2 if an optional package is missing; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    traced = "--traceback" in argv  # wherever it stands, as it is added to a command that has failed
    argv = [word for word in argv if word != "--traceback"]
    arguments = parser(argv).parse_args(argv)
    if traced:
        os.environ[TRACEBACK] = "1"
    try:
        code: int = arguments.command(arguments) or 0
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


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line; only the command that it names has arguments."""
    found = Parser("gradsel", description="Gradient-based sparse fine-tuning.")
    found.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    found.add_argument("--traceback", action="store_true", help="show where an error was raised, besides its message")
    commands = found.add_subparsers(metavar="command")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        if name == wanted:
            import_module(f"gradsel.cli.{name}").add_to(commands, text)
        else:
            commands.add_parser(name, help=text)
    return found


if __name__ == "__main__":
    sys.exit(main())
