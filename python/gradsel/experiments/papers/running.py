"""run(): an experiment of a paper on the data that are there, into one folder with rows and a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsel.errors import RunError, expected, one_line
from gradsel.experiments.papers import selections
from gradsel.experiments.papers.experiment import Cell, Experiment
from gradsel.experiments.papers.measures import Job, completed
from gradsel.experiments.papers.planning import config_of
from gradsel.experiments.papers.results import Row, rows_of, table_of
from gradsel.experiments.papers.sources import SOURCES
from gradsel.experiments.tidy import folder_of_runs, write_rows
from gradsel.training.changed import Fingerprint
from gradsel.training.folder import write_text

SETTINGS, ROWS, TABLE, RUNS, DATA = "experiment.yaml", "results.csv", "table.md", "runs", "data"


@dataclass(frozen=True)
class Ran:
    """What :func:`run` returns.

    Attributes:
        folder: where everything lies.
        rows: one for each number; see :class:`Row`.
    """

    experiment: Experiment
    folder: Path
    rows: list[Row]

    def __str__(self) -> str:
        return table_of(self.experiment, self.rows)


def run(
    experiment: Experiment,
    root: Path | None,
    folder: Path,
    only: Sequence[str] = (),
    seeds: int | None = None,
    given: Mapping[str, Any] | None = None,
    small: bool = False,
    quiet: bool = False,
) -> Ran:
    """Runs an experiment, or what is left of it.

    Data sets that are not below the root are left out and told. Called again with the same folder, it goes on where it
    stopped, also with more of the experiment; finished runs are read.

    Args:
        root: the folder with the data sets; None for an experiment without data.
        folder: for results.csv, table.md and the runs.
        only: see :meth:`Experiment.cells`.
        seeds: runs of each; None: as in the paper.
        given: settings that override the experiment's, by dotted names.
        small: toy sizes, for measures that have models of their own.
        quiet: print nothing.

    Raises:
        RunError: something does not fit, or the folder has another experiment; or runs have failed, after all others.
    """
    given = dict(given or {})
    with expected():
        cells = experiment.cells(only, seeds)
        places, lacking = find(experiment, cells, root)
        if root is None and lacking:
            raise ValueError(f"{experiment.name} needs data; pass --data with the folder that has {', '.join(lacking)}")
        if needed := [name for name in experiment.also if name in lacking]:
            raise ValueError(f"{experiment.name} needs {', '.join(needed)} below {root}; {said(needed[0])}")
        left_out = [cell for cell in cells if cell.data in lacking]
        cells = [cell for cell in cells if cell.data not in lacking]
        if not cells:
            missing = "; ".join(said(name) for name in lacking)
            raise ValueError(f"{experiment.name}: no data set of it is below {root}; it takes {missing}")
        jobs = {cell: _job(experiment, cell, folder, places, given, small) for cell in cells}
    if lacking and not quiet:
        print(f"left out, {len(left_out)} runs: {'; '.join(said(name) for name in lacking)}", file=sys.stderr)
    values = {"experiment": experiment.name, "settings": json.loads(json.dumps(given))}
    with folder_of_runs(folder / SETTINGS, values, "--output") as before:
        if before and before != values:
            settings = before.get("settings") or "of the paper"
            raise RunError(f"--output: {folder} has {before.get('experiment')} with the settings {settings}")
        return _run(experiment, folder, jobs, quiet)


def _run(experiment: Experiment, folder: Path, jobs: Mapping[Cell, tuple[Job, str]], quiet: bool) -> Ran:
    rows: list[Row] = []
    failed: list[str] = []
    last: ValueError | None = None
    data: dict[str, Fingerprint] = {}
    for number, (cell, (job, note)) in enumerate(jobs.items(), 1):
        try:
            found = completed(job, experiment.measure, data)
        except ValueError as error:  # what does not fit, or a result that is not finite; the other runs go on
            failed, last = [*failed, f"{cell}: {one_line(error)}"], error
            shown = f"failed, {one_line(error)}"
        else:
            rows += rows_of(experiment, cell, found, job.config, note)
            write_rows(folder / ROWS, rows, Row)
            known = [name for name in experiment.metrics if name in found.values]
            shown = ", ".join(f"{name} {found.values[name]:.4g}" for name in known)
        if not quiet:
            print(f"{number} of {len(jobs)}, {cell}: {shown}", file=sys.stderr)
    if not failed:
        rows += _across(experiment, jobs)
    write_rows(folder / ROWS, rows, Row)
    write_text(folder / TABLE, f"{table_of(experiment, rows)}\n")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed ({'; '.join(failed)}); {folder / TABLE} has the others"
        ) from last
    return Ran(experiment, folder, rows)


def find(experiment: Experiment, cells: Iterable[Cell], root: Path | None) -> tuple[dict[str, Path], list[str]]:
    """The folders of the data sets that are there, and the names of those that are not.

    Raises:
        ValueError: there is no such root.
    """
    if root is not None and not root.is_dir():
        raise ValueError(f"--data: there is no folder {root}")
    places: dict[str, Path] = {}
    lacking = []
    for name in experiment.needed(cells):
        place = None if root is None else SOURCES[name].find(root)
        if place is None:
            lacking.append(name)
        else:
            places[name] = place
    return places, lacking


def said(name: str) -> str:
    """Where a data set is had, and what its folder has to be called."""
    source = SOURCES[name]
    inside = f" with {' and '.join(source.inside)}" if source.inside else ""
    return f"{name} from {source.had}, in a folder {' or '.join(source.folders)}{inside}"


def _job(
    experiment: Experiment, cell: Cell, folder: Path, places: Mapping[str, Path], given: Mapping[str, Any], small: bool
) -> tuple[Job, str]:
    own = folder / RUNS / _slug(cell)
    config, note = config_of(experiment, cell, own / "run", places, given)
    return Job(config, own, folder / DATA, experiment.settings[cell.setting], places, small), note


def _slug(cell: Cell) -> str:
    parts = (cell.model, cell.method, cell.data, cell.setting, str(cell.seed))
    text = "_".join(part for part in parts if part)
    return "".join(letter if letter.isalnum() or letter in "-_=.*+" else "-" for letter in text).replace("*", "-star")


def _across(experiment: Experiment, jobs: Mapping[Cell, tuple[Job, str]]) -> list[Row]:
    """Rows about several runs together: the overlap of the selections for different data sets."""
    if experiment.measure != "overlap":
        return []
    rows = []
    apart: dict[tuple[str, str, str, int], dict[str, Cell]] = {}
    for cell in jobs:
        apart.setdefault((cell.model, cell.method, cell.setting, cell.seed), {})[cell.data] = cell
    for cells in apart.values():
        found = selections.overlap({name: jobs[cell][0].folder for name, cell in cells.items()})
        for name, values in found.items():
            job, note = jobs[cells[name]]
            rows += rows_of(experiment, cells[name], selections.Measured(values, {}), job.config, note)
    return rows
