"""Methods on two real transfers: ``python -m benchmarks.transfers FOLDER``.

Data and models come from packages and go to FOLDER, and so does every run; a run that is finished is not repeated, so
the command goes on where it stopped. The rows of all that is finished go to ``benchmarks/results/transfers-cpu.csv``,
also when it is stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from benchmarks.harness.environment import MACHINE, RESULTS, machine
from benchmarks.harness.results import load, merge
from benchmarks.transfers import data
from benchmarks.transfers.data import DIGITS, REVIEWS
from benchmarks.transfers.plan import FACTORS, SEEDS, STAGES, settings
from gradsel.experiments import compare
from gradsel.experiments.comparing import ROWS
from gradsel.experiments.tidy import Row

FIELDS = ["transfer", *(field.name for field in fields(Row)), *MACHINE]
KEY = ("transfer", "split", "method", "seed", "learning_rate")
FILE = RESULTS / "transfers-cpu.csv"


def stages(only: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Transfers and methods in the order in which they are run; each stage of a transfer repeats its earlier ones."""
    so_far: dict[str, tuple[str, ...]] = {}
    for transfer, methods in STAGES:
        so_far[transfer] = tuple(dict.fromkeys((*so_far.get(transfer, ()), *methods)))
        if only in (None, transfer):
            yield transfer, so_far[transfer]


def collect(folder: Path, path: Path = FILE) -> None:
    """Adds the rows of all comparisons, finished or not, to the results file."""
    where = machine()
    for transfer in (REVIEWS, DIGITS):
        rows = folder / "compared" / transfer / ROWS
        if rows.is_file():
            merge(path, FIELDS, KEY, [{"transfer": transfer, **row, **where} for row in load(rows)], ordered=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfers", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for data, models and runs")
    parser.add_argument("--only", choices=sorted({transfer for transfer, _ in STAGES}), help="one of the transfers")
    arguments = parser.parse_args()
    data.make(arguments.folder)
    try:
        for transfer, methods in stages(arguments.only):
            config = settings(arguments.folder, transfer, arguments.folder / "compared" / transfer)
            found = compare(config, methods, seeds=SEEDS, factors=FACTORS[transfer])
            print(f"\n{transfer}\n\n{found}\n", flush=True)
    finally:
        collect(arguments.folder)


if __name__ == "__main__":
    main()
