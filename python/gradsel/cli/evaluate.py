"""``gradsel evaluate``: tests a result of ``gradsel finetune``."""

from __future__ import annotations

import argparse
import json

from gradsel.cli.running import is_first, run
from gradsel.errors import expected
from gradsel.training.config import run_in


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("evaluate", help=text)
    parser.add_argument("folder", metavar="FOLDER", help="what gradsel finetune wrote")
    parser.add_argument("--data", metavar="DATA", help="other data with the same classes; default: the run's test set")
    parser.add_argument("--json", action="store_true", help="print all metrics as JSON")
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    def command() -> None:
        with expected():
            run_in(arguments.folder)  # before torch is imported
        from gradsel.training import evaluate
        from gradsel.training.tasks import described

        found = evaluate(arguments.folder, arguments.data)
        if not is_first():
            return
        if arguments.json:
            print(json.dumps(found, ensure_ascii=False, indent=1))
            return
        print(described(arguments.folder, found))

    return run("evaluate", command)
