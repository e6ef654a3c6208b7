"""``gradsel resume``: goes on with a run of ``gradsel finetune`` that was stopped or killed."""

from __future__ import annotations

import argparse

from gradsel.cli.running import run
from gradsel.errors import expected
from gradsel.training.config import run_in


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("resume", help=text)
    parser.add_argument("folder", metavar="FOLDER", help="the folder of the run")
    parser.set_defaults(command=_resume)


def _resume(arguments: argparse.Namespace) -> int:
    def command() -> None:
        with expected():
            run_in(arguments.folder)  # before torch is imported
        from gradsel.training import resume

        resume(arguments.folder)

    return run("resume", command)
