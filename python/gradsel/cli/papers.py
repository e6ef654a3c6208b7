"""``gradsel papers``: the papers' tables, figures and ablations by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradsel.cli.finetune import add_flags, given_by, shared
from gradsel.cli.running import run
from gradsel.errors import expected
from gradsel.tables import table

#: Settings that are each run's own: its data and method.
_OWN = ("data.path", "data.task", "data.kind", "data.layout", "data.root", "data.download", "output.report")
#: What may be set for all runs of an experiment.
_SHARED = shared(*_OWN, "output.folder", "output.keep")


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("papers", help=text)
    inner = parser.add_subparsers(metavar="verb")
    inner.add_parser("list", help="list the experiments").set_defaults(command=_list)
    show = inner.add_parser(
        "show", help="what an experiment consists of, the data that it lacks, and what it costs",
        usage="gradsel papers show [--data ROOT] [option ...] NAME",
    )  # fmt: skip
    show.add_argument("--measure", action="store_true", help="measure a step of each model and method, for the hours")
    starts = inner.add_parser(
        "run", help="run an experiment on the data that are there, and compare with the paper",
        usage="gradsel papers run --data ROOT [option ...] NAME",
    )  # fmt: skip
    starts.add_argument("--output", metavar="FOLDER", help="for rows, table and runs; default: runs/ and the name")
    starts.add_argument("--small", action="store_true", help="gps/cost: toy models, to try it")
    for each in (show, starts):
        each.add_argument("name", metavar="NAME", help="gps/table2, grft/masks, ...")
        each.add_argument("--data", metavar="ROOT", help="the folder with the data sets, each in its own folder")
        each.add_argument(
            "--only", default="", metavar="A,B,...", help="data sets, methods, models and settings by the paper's names"
        )
        each.add_argument("--seeds", type=int, metavar="N", help="runs of each; default: as in the paper, or 1")
        add_flags(each, _SHARED)
    show.set_defaults(command=_show)
    starts.set_defaults(command=_run)


def _list(arguments: argparse.Namespace) -> int:
    def command() -> None:
        from gradsel.experiments.papers import EXPERIMENTS

        rows = [(each.name, each.source, str(len(each.cells())), each.title) for each in EXPERIMENTS.values()]
        print("\n".join(table(("experiment", "in the paper", "runs", "shows"), rows)))

    return run("papers", command)


def _show(arguments: argparse.Namespace) -> int:
    def command() -> None:
        from gradsel.experiments.papers import experiment
        from gradsel.experiments.papers.estimating import described

        with expected():
            found = experiment(arguments.name)
            print(described(found, _root(arguments), _only(arguments), arguments.seeds, _given(arguments),
                            arguments.measure))  # fmt: skip

    return run("papers", command)


def _run(arguments: argparse.Namespace) -> int:
    def command() -> None:
        from gradsel.experiments import papers

        with expected():
            found = papers.experiment(arguments.name)
            folder = Path(arguments.output or f"runs/{arguments.name.replace('/', '-')}")
            given = _given(arguments)
        print(papers.run(found, _root(arguments), folder, _only(arguments), arguments.seeds, given, arguments.small))

    return run("papers", command)


def _root(arguments: argparse.Namespace) -> Path | None:
    return None if arguments.data is None else Path(arguments.data)


def _only(arguments: argparse.Namespace) -> list[str]:
    return [name for name in arguments.only.split(",") if name]


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return given_by(arguments, _SHARED)
