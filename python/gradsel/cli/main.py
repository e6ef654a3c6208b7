"""The command line: ``gradsel demo``, ``gradsel count``, ``gradsel delta`` and ``gradsel config``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import gradsel_kernels
from gradsel.cli import delta as delta_cli
from gradsel.papers import counting
from gradsel.ranking.policies import Columns, Global, PerLayer, PerNeuron, Policy, Rows
from gradsel.tables import table

_DEMO, _ABLATION = Path("demo-output/gps-digits.png"), Path("demo-output/ablation.png")
_DEMO_NEEDS = {"sklearn", "matplotlib", "peft"}

_COUNTED: dict[str, type[PerNeuron] | type[Rows] | type[Columns]] = {
    "per-neuron": PerNeuron,
    "rows": Rows,
    "columns": Columns,
}
_SHARED: dict[str, type[PerLayer] | type[Global]] = {"per-layer": PerLayer, "global": Global}
_POLICIES = ", ".join([*(f"{name}:K" for name in _COUNTED), *(f"{name}:FRACTION" for name in _SHARED)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 if a delta cannot be made or applied; 2 if an optional package is missing.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has stopped, as in ``gradsel count | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would raise again
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gradsel", description="Gradient-based sparse fine-tuning.")
    parser.add_argument("--version", action="version", version=f"gradsel {gradsel_kernels.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="compare GPS with other ways to fine-tune, on digits, in about a minute")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.add_argument(
        "--ablation", action="store_true", help="compare levels, criteria, losses and anchors instead; four minutes"
    )
    demo.add_argument(
        "--output",
        type=Path,
        metavar="PNG",
        help=f"the picture to write, next to a JSON file of all numbers (default: {_DEMO}, {_ABLATION})",
    )
    demo.set_defaults(command=_demo)

    count = commands.add_parser(
        "count",
        help="count the parameters that the papers' settings, or one policy, train",
        description="Without options: the numbers of parameters that the papers print, next to ours.",
    )
    count.add_argument("--policy", type=_policy, metavar="POLICY", help=f"count this policy: {_POLICIES}")
    count.add_argument("--model", choices=list(counting.MODELS), help="with --policy; default: vit-b-16")
    count.add_argument("--classes", type=_classes, metavar="C", help="with --policy; default: 1000")
    count.set_defaults(command=_count, refuse=count.error)

    delta_cli.add_to(commands)

    config = commands.add_parser("config", help="which kernels are in use on this machine, and why")
    config.set_defaults(command=_config)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from gradsel.demo import ablation, demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_NEEDS:
            raise
        print(f"The demo needs {package}, which is not installed: pip install 'gradsel-kernels[demo]'", file=sys.stderr)
        return 2
    study, picture, record = (
        (ablation, _ABLATION, "ablation.json") if arguments.ablation else (demo, _DEMO, "results.json")
    )
    results = study.run(arguments.seeds, arguments.quiet)
    print(study.table(results))
    if results.delta is not None:
        print(f"\n{demo.saved_line(results.delta)}")
    output: Path = arguments.output or picture
    demo.save(results, output.with_name(record))
    study.draw(results, output)
    print(f"\nPicture: {output}   All numbers: {output.with_name(record)}")
    return 0


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


def _config(arguments: argparse.Namespace) -> int:
    gradsel_kernels.show_config()
    return 0


if __name__ == "__main__":
    sys.exit(main())
