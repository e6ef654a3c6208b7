"""A training step of every model and method of the papers' experiments: ``python -m benchmarks.papers.steps``.

On this CPU, with random weights, on four images, and with the options of the first run that has the method.
``gradsel papers show --measure`` measures the same for one experiment. Results go to
``benchmarks/results/papers-steps-cpu.csv``; what it has of this machine is not measured again. The documentation
multiplies them by the steps of all runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness.environment import MACHINE, RESULTS, machine, processor
from benchmarks.harness.results import Row, latest, load, merge
from gradsel.errors import one_line
from gradsel.experiments.papers import EXPERIMENTS
from gradsel.experiments.papers.estimating import Hours, Load, hours_of, key_of, loads_of, step_seconds
from gradsel.experiments.papers.experiment import Cell, Experiment
from gradsel.training.config import Config

FIELDS = ["model", "method", "seconds_per_sample", "unknown", *MACHINE]
KEY = ("model", "method", "device", "threads")
FILE = RESULTS / "papers-steps-cpu.csv"
CLASSES = 100


def alike(experiment: Experiment, firsts: dict[tuple[str, str], Config]) -> Iterator[tuple[Cell, Config, Load]]:
    """The runs of an experiment, each with the options of the first run that has its model and method.

    Args:
        firsts: the settings of that run by model and method; filled here.
    """
    for cell, config, load_ in loads_of(experiment, experiment.cells()):
        first = firsts.setdefault((config.model.name, config.method.name), config)
        yield cell, replace(config, method=first.method), load_


def hours(rows: list[Row]) -> dict[str, tuple[int, int, Hours]]:
    """Runs, steps and hours of every experiment that trains.

    Args:
        rows: those of the results file.
    """
    firsts: dict[tuple[str, str], Config] = {}
    planned = {name: list(alike(each, firsts)) for name, each in EXPERIMENTS.items()}
    measured = {(row["model"], row["method"]): row for row in latest(rows)}
    samples: dict[object, float | str] = {}
    for pair, config in firsts.items():
        row = measured.get(pair, {"seconds_per_sample": "", "unknown": "not measured"})
        samples[key_of(config, "cpu")] = float(row["seconds_per_sample"] or 0) or row["unknown"]
    return {
        name: (len(loads), sum(each.steps for _, _, each in loads), hours_of(loads, "cpu", samples))
        for name, loads in planned.items()
        if loads
    }


def measure(path: Path, seconds: float) -> int:
    """Measures what the file lacks, until the time is over; how many are left."""
    firsts: dict[tuple[str, str], Config] = {}
    for each in EXPERIMENTS.values():
        list(alike(each, firsts))
    here = (processor(), str(torch.get_num_threads()))
    rows = load(path) if path.exists() else []
    known = {(row["model"], row["method"]) for row in rows if (row["device"], row["threads"]) == here}
    left = {pair: config for pair, config in firsts.items() if pair not in known}
    end = time.monotonic() + seconds
    while left and time.monotonic() < end:
        (model, method), config = left.popitem()
        taken, unknown = "", ""
        try:
            taken = f"{step_seconds(config, CLASSES, 'cpu') / config.recipe.batch_size:.4g}"
        except (ValueError, OSError, ModuleNotFoundError) as error:
            unknown = one_line(error)
        print(f"{model}, {method}: {taken or unknown} s", flush=True)
        row = {"model": model, "method": method, "seconds_per_sample": taken, "unknown": unknown, **machine()}
        merge(path, FIELDS, KEY, [row])
    return len(left)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers.steps", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="after which nothing more is begun; default: 3600"
    )
    if left := measure(FILE, parser.parse_args().seconds):
        print(f"{left} are left; the same command goes on")


if __name__ == "__main__":
    main()
