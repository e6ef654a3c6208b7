"""``gradsel evaluate``: tests a result of ``gradsel finetune``."""

from __future__ import annotations

import argparse
import json

from gradsel.cli.running import run
from gradsel.tables import table


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("evaluate", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("folder", metavar="FOLDER", help="what gradsel finetune wrote")
    parser.add_argument("--data", metavar="DATA", help="other data with the same classes; default: the run's test set")
    parser.add_argument("--json", action="store_true", help="print all metrics as JSON")
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    def command() -> None:
        from gradsel.training import evaluate

        found = evaluate(arguments.folder, arguments.data)
        if arguments.json:
            print(json.dumps(found, ensure_ascii=False, indent=1))
            return
        rows = [
            (name, *(f"{100 * values[key]:9.1f}" for key in ("precision", "recall", "f1")), f"{values['samples']:7,}")
            for name, values in found["per_class"].items()
        ]
        print("\n".join(table(("class", "precision", "recall", "f1", "samples"), rows)))
        five = f", top-5 {found['top5']:.2f} %" if "top5" in found else ""
        print(f"top-1 {found['top1']:.2f} %{five}, F1 {found['f1']:.2f} %, Matthews {found['matthews']:.3f}, "
              f"loss {found['loss']:.4f}, {found['samples']:,} samples")  # fmt: skip

    return run("evaluate", command)
