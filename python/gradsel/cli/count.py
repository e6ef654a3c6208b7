"""``gradsel count``: the numbers of parameters that the papers' settings, or one policy, train."""

from __future__ import annotations

import argparse
import sys

from gradsel.papers import counting
from gradsel.ranking.policies import ByMass, Columns, Global, PerLayer, PerNeuron, Policy, Rows
from gradsel.tables import table

_COUNTED: dict[str, type[PerNeuron] | type[ByMass] | type[Rows] | type[Columns]] = {
    "per-neuron": PerNeuron,
    "by-mass": ByMass,
    "rows": Rows,
    "columns": Columns,
}
_SHARED: dict[str, type[PerLayer] | type[Global]] = {"per-layer": PerLayer, "global": Global}
_POLICIES = ", ".join([*(f"{name}:K" for name in _COUNTED), *(f"{name}:FRACTION" for name in _SHARED)])


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    count = commands.add_parser(
        "count",
        help=text,
        description="Without options: the numbers of parameters that the papers print, next to ours.",
    )
    count.add_argument("--policy", type=_policy, metavar="POLICY", help=f"count this policy: {_POLICIES}")
    count.add_argument("--model", choices=list(counting.MODELS), help="with --policy; default: vit-b-16")
    count.add_argument("--classes", type=_classes, metavar="C", help="with --policy; default: 1000")
    count.set_defaults(command=_count, refuse=count.error)


def _count(arguments: argparse.Namespace) -> int:
    if arguments.policy is None:
        for option in ("model", "classes"):
            if getattr(arguments, option) is not None:
                arguments.refuse(f"--{option} needs --policy, one of {_POLICIES}")
        _print_tables()
        return 0
    name, classes = arguments.model or "vit-b-16", arguments.classes or 1000
    try:
        model = counting.meta_model(name, classes)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        print(error, file=sys.stderr)
        return 2
    counted = counting.count(model, arguments.policy)
    print(f"{name} with {classes:,} classes, {arguments.policy}")
    rows = [("ranked", counted.ranked, f"of {counted.rankable:,}")]
    rows += [(reason, number, "whole") for reason, number in counted.whole.items()]
    rows.append(("all", counted.trained, f"of {counted.total:,} ({counted.percent:.3f} %)"))
    cells = [(what, f"{number:>13,}", rest) for what, number, rest in rows]
    print("\n".join(table(("", f"{'trained':>13}", ""), cells)))
    return 0


def _print_tables() -> None:
    available = counting.available_models()
    rows = counting.reproduce(available)
    for name in dict.fromkeys(row.table for row in rows):
        print(f"{name}; M: million parameters, %: percentage of all, the head included\n")
        lines = [
            (
                row.name,
                row.preset.model,
                f"{row.preset.classes:>7}",
                str(row.policy),
                f"{row.count.trained:>9,}",
                f"{row.figure:.4f}",
                f"{row.printed:.2f} {row.unit}",
                f"{row.difference:+.4f}",
                row.note,
            )
            for row in rows
            if row.table == name
        ]
        heads = ("data set", "model", "classes", "policy", "  trained", "ours", "paper", "differs", "note")
        print("\n".join(table(heads, lines)) + "\n")
    missing = [name for name in counting.MODELS if name not in available]
    if missing:
        print(
            f"Left out: the rows of {', '.join(missing)}, which need transformers: pip install 'gradsel-kernels[bench]'"
        )


def _policy(text: str) -> Policy:
    name, colon, value = text.partition(":")
    if not colon or name not in {*_COUNTED, *_SHARED}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a policy; expected one of {_POLICIES}")
    try:
        return _COUNTED[name](int(value)) if name in _COUNTED else _SHARED[name](fraction=float(value))
    except ValueError:
        expected = "an integer >= 1" if name in _COUNTED else "a number above 0 and up to 1"
        raise argparse.ArgumentTypeError(f"{name}:{value} is not a policy: {value!r} is not {expected}") from None


def _classes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of classes; expected an integer >= 1")
    return int(text)
