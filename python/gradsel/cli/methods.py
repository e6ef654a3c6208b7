"""``gradsel methods``: the methods of ``gradsel finetune`` and their options."""

from __future__ import annotations

import argparse
from dataclasses import fields


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    commands.add_parser("methods", help=text).set_defaults(command=_methods)


def _methods(arguments: argparse.Namespace) -> int:
    from gradsel.methods import METHODS

    for name, kind in METHODS.items():
        print(f"{name}: {kind.summary}; learning rate {kind.rate:g}")
        for option in fields(kind):
            default = "" if option.default is None else f" (default: {option.default})"
            print(f"    {option.name}: {option.metadata['help']}{default}")
    return 0
