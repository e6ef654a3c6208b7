"""``gradsel methods``: the methods of ``gradsel finetune``, their options, and how much they train."""

from __future__ import annotations

import argparse
from dataclasses import fields

from gradsel.cli.finetune import GROUPS


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("methods", help=text)
    parser.set_defaults(command=_methods)


def _methods(arguments: argparse.Namespace) -> int:
    from gradsel.methods import METHODS
    from gradsel.papers.counting import meta_model

    options = "method.options."
    flags = {flag.field.removeprefix(options): flag.flag for flag in GROUPS["method"] if options in flag.field}
    classes = 100
    model = meta_model("vit-b-16", classes)
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, kind in METHODS.items():
        trained = kind().trained_on(model)
        print(f"{name}: {kind.summary}; learning rate {kind.rate:g}; trains {100 * trained / total:.2f} % of ViT-B/16")
        for option in fields(kind):
            default = "" if option.default is None else f" (default: {option.default})"
            print(f"    {option.name} ({flags[option.name]}): {option.metadata['help']}{default}")
    print(f"Shares are of ViT-B/16 with a head for {classes} classes, with the default options.")
    return 0
