"""The rows of an experiment, one for each number, and the table that has the paper's numbers beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradsel.experiments.papers.experiment import Cell, Experiment
from gradsel.experiments.papers.selections import Measured
from gradsel.experiments.tidy import mean_and_deviation, measured
from gradsel.methods import method
from gradsel.papers.printed import Printed, printed
from gradsel.training.config import Config

#: Measures that the paper's column of a data set is about, before others.
_SCORES = ("top1", "shared")
_PERCENT = "percent"


@dataclass(frozen=True)
class Row:
    """One number of a run.

    Attributes:
        method, model, data, setting: the paper's names.
        metric, value: what was measured; accuracies and shares are in percent.
        trained, percent: trained scalars, and as a percentage of the model's parameters.
        step_ms: milliseconds of training by steps; loading and evaluation in between are included.
        peak_bytes: most memory of the GPU; None on the CPU.
        config: name and options of the method, as JSON.
        note: what is not as published.
    """

    experiment: str
    model: str
    method: str
    data: str
    setting: str
    seed: int
    metric: str
    value: float
    learning_rate: float | None
    trained: int | None
    percent: float | None
    step_ms: float | None
    peak_bytes: int | None
    file_bytes: int | None
    config: str
    note: str


def rows_of(experiment: Experiment, cell: Cell, found: Measured, config: Config, note: str) -> list[Row]:
    """The rows of one run."""
    how, results = method(config.method.name, **config.method.options), found.results
    of_run = measured(how, results)
    return [
        Row(
            experiment=experiment.name,
            model=cell.model,
            method=cell.method,
            data=cell.data,
            setting=cell.setting,
            seed=config.seed,
            metric=name,
            value=value,
            learning_rate=config.recipe.learning_rate if results else None,
            note=note,
            **of_run,
        )
        for name, value in found.values.items()
    ]


def table_of(experiment: Experiment, rows: Sequence[Row]) -> str:
    """A table in Markdown: ours, the paper's number, and the difference, with a line for each method and metric.

    Means are over the data sets that all numbers of a line are there for; where data sets lack, they are not the
    paper's means, and so no number of the paper stands beside them.
    """
    lines = [
        f"{experiment.source}: {experiment.title}",
        "",
        "| model | method | data | setting | | ours | paper | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    metrics = experiment.metrics or tuple(dict.fromkeys(row.metric for row in rows))
    for model, name, setting in dict.fromkeys((row.model, row.method, row.setting) for row in rows):
        own = [row for row in rows if (row.model, row.method, row.setting) == (model, name, setting)]
        for metric in metrics:
            means = []
            for data in dict.fromkeys(row.data for row in own):
                values = [row.value for row in own if row.data == data and row.metric == metric]
                if values:
                    lines.append(
                        _line((model, name, data, setting, metric), values, _paper(experiment, own[0], data, metric))
                    )
                    means.append(sum(values) / len(values))
            if len(means) > 1:
                complete = len(means) == len(experiment.data)
                paper = _paper(experiment, own[0], "Mean", metric) if complete else None
                label = "Mean" if complete else f"mean of {len(means)}"
                lines.append(_line((model, name, label, setting, metric), [sum(means) / len(means)], paper))
        shares = {row.data: row.percent for row in own if row.percent is not None}
        if shares and _PERCENT not in metrics:
            complete = len(shares) == len(experiment.data)
            paper = _paper(experiment, own[0], "Params. (%)", _PERCENT) if complete else None
            mean = sum(shares.values()) / len(shares)
            lines.append(_line((model, name, "", setting, "trained in %"), [mean], paper))
    lines += _differences(experiment, rows)
    return "\n".join([*lines, "", *(f"- {note}" for note in (*experiment.notes, *_notes(rows)))])


def _line(cells: Iterable[str], values: Sequence[float], paper: float | None) -> str:
    mean, deviation = mean_and_deviation(values)
    ours = _number(mean) if deviation is None else f"{_number(mean)} ± {deviation:.2f}"
    beside = ("", "") if paper is None else (_number(paper), f"{mean - paper:+.2f}")
    return f"| {' | '.join((*cells, ours, *beside))} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def _paper(experiment: Experiment, row: Row, column: str, metric: str) -> float | None:
    """The paper's number for a metric of a method, in a column of its table."""
    table = printed().get(experiment.name)
    if table is None:
        return None
    if metric in table.columns:  # one column for each metric
        return table.value(row.method, metric)
    if metric not in _SCORES and not (metric == _PERCENT and column.endswith("(%)")):
        return None
    return _looked_up(table, row, column)


def _looked_up(table: Printed, row: Row, column: str) -> float | None:
    for name in (row.method, f"{row.model} + {row.method}"):
        for place in (column, f"{row.model} {column}"):
            if (value := table.value(name, place)) is not None:
                return value
    return None


def _differences(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Lines about the difference of two methods, where the paper states it."""
    table = printed().get(experiment.name)
    if table is None or table.metric != "difference":
        return []
    lines = []
    for name in table.rows:
        first, _, second = name.partition(" - ")
        for metric in table.columns:
            values = {}
            for method_name in (first, second):
                own = [row.value for row in rows if (row.method, row.metric) == (method_name, metric)]
                if own:
                    values[method_name] = sum(own) / len(own)
            if len(values) == 2:
                ours = values[first] - values[second]
                lines.append(_line(("", name, "", "", metric), [ours], table.value(name, metric)))
    return lines


def _notes(rows: Sequence[Row]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.note and row.method not in found.setdefault(row.note, []):
            found[row.note].append(row.method)
    return [f"{', '.join(methods)}: {note}." for note, methods in found.items()]
