"""``gradsel compare``: methods on one data set and one model, with tuned learning rates and several seeds."""

from __future__ import annotations

import argparse
import re

from gradsel.cli.finetune import add_flags, config_of_flags, shared
from gradsel.cli.running import run
from gradsel.errors import expected

#: What is the same for all methods; each has its own options and learning rate.
_SHARED = shared("recipe.learning_rate", "output.report", "output.keep")


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser(
        "compare", help=text,
        usage="gradsel compare --methods A,B,... --data DATA --model MODEL [option ...]",
    )  # fmt: skip
    parser.add_argument(
        "--methods", required=True, metavar="A,B,...",
        help="names of methods, separated by commas, each with options after colons: gps:k=2:scope=net",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each method that count; default: 3")
    parser.add_argument(
        "--factors", type=float, nargs="+", metavar="X",
        help="what each method's learning rate is multiplied by in the search; one factor: no search; default: a "
        "ninth, a third, 1, 3, 9",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="runs at a time, each with a model of its own, so as many as memory allows; default: 1",
    )  # fmt: skip
    add_flags(parser, _SHARED)
    parser.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    def command() -> None:
        with expected():
            config = config_of_flags(arguments, _SHARED)
            config.require()
        from gradsel.experiments import compare
        from gradsel.experiments.comparing import FACTORS

        given = re.split(r",(?![^\[]*\])", arguments.methods)  # but not in gps:skip_blocks=[0,1]
        names = [name.strip() for name in given if name.strip()]
        print(compare(config, names, arguments.seeds, arguments.factors or FACTORS, jobs=arguments.jobs))

    return run("compare", command)
