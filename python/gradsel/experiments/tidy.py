"""The rows of a comparison, one for each run: as a csv file, and summed up as a table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from gradsel.errors import RunError, expected, one_line
from gradsel.files import locked
from gradsel.methods import Method
from gradsel.training.folder import write_text


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        split: what was scored: ``"validation"`` of a learning rate that was tried, ``"test"`` of a run that counts.
        method: as it was named.
        config: name and options of the method, as JSON.
        metric, value: ``"top1"``, in percent; NaN if the run gave no result.
        trained, percent: trained scalars, and as a percentage of the model's parameters.
        step_ms: milliseconds of training by steps of the optimizer; loading and evaluation in between are included.
        peak_bytes: most memory of the GPU; None on the CPU.
        file_bytes: of the files that hold the result.
        note: anything unusual.
    """

    split: str
    method: str
    seed: int
    metric: str
    value: float
    learning_rate: float
    trained: int | None
    percent: float | None
    step_ms: float | None
    peak_bytes: int | None
    file_bytes: int | None
    config: str
    note: str

    @property
    def run(self) -> tuple[Any, ...]:
        """What no other run of a comparison has."""
        return (self.split, self.method, self.seed, self.learning_rate if self.split == "validation" else None)


def row_of(
    split: str, name: str, how: Method, results: Mapping[str, Any], rate: float, seed: int, note: str,
    value: float | None = None,
) -> Row:  # fmt: skip
    """A row of the results of a run; without a value, that of its test set."""
    return Row(
        split=split,
        method=name,
        seed=seed,
        metric="top1",
        value=results["metrics"]["top1"] if value is None else value,
        learning_rate=rate,
        note=note,
        **measured(how, results),
    )


def measured(how: Method, results: Mapping[str, Any]) -> dict[str, Any]:
    """What rows say of a run besides its score: counts, time, bytes, and the method with its options."""
    steps = results.get("steps")
    return {
        "trained": results.get("trained"),
        "percent": results.get("share"),
        "step_ms": round(1000 * results["seconds"]["training"] / steps, 3) if steps else None,
        "peak_bytes": results.get("peak_memory_bytes"),
        "file_bytes": results.get("bytes"),
        "config": json.dumps({"name": how.name, **how.options()}),
    }


@contextmanager
def folder_of_runs(path: Path, values: Mapping[str, Any], argument: str) -> Iterator[dict[str, Any] | None]:
    """Keeps other processes out of a folder of runs, and yields what an earlier call wrote down in it.

    Without an earlier call the folder is made, ``values`` are written down, and None is yielded.

    Args:
        path: of the settings.
        argument: names the folder in errors.

    Raises:
        RunError: the folder has something else in it, its settings are damaged, or another process is at work in it.
    """
    folder = path.parent
    with expected():
        if not folder.is_dir():
            if folder.exists():
                raise RunError(f"{argument}: {folder} is a file; name a folder")
            folder.mkdir(parents=True)
    with locked(folder) as ours:
        if not ours:
            raise RunError(f"{argument}: another process is at work in {folder}; wait for it, or name another folder")
        yield _settings_before(path, values, argument)


def _settings_before(path: Path, values: Mapping[str, Any], argument: str) -> dict[str, Any] | None:
    if path.is_file():
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunError(f"{argument}: {path} cannot be read: {one_line(error)}") from error
        if not isinstance(before, dict):
            raise RunError(f"{argument}: {path} is damaged: it has no settings")
        return before
    cut_off = path.with_name(path.name + ".new")  # by a process that was killed while it wrote
    if any(entry != cut_off for entry in path.parent.iterdir()):
        raise RunError(f"{argument}: {path.parent} exists and is not empty")
    with expected():
        write_text(path, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
    return None


def write_rows(path: Path, rows: Sequence[Any], kind: Any = Row) -> None:
    """Writes a csv file with a line for each row.

    Args:
        kind: the dataclass of the rows, whose fields are the columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in asdict(row).items()} for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path, argument: str) -> list[Row]:
    """The rows that an earlier call has written; none if there was none.

    Args:
        argument: names the folder in errors.

    Raises:
        RunError: they are damaged.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        return [Row(**{each.name: _read(each.type, line[each.name]) for each in fields(Row)}) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise RunError(
            f"{argument}: {path} is not as it was written ({type(error).__name__}: {one_line(error)}); remove it, and "
            "name all methods again: their runs are read, not repeated"
        ) from error


def _read(kind: Any, text: str) -> Any:
    """A value of a field from a csv file, in which None is empty."""
    name = str(kind).partition(" ")[0]
    if name == "str":
        return text
    return None if text == "" and "None" in str(kind) else {"int": int, "float": float}[name](text)


def finals(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that count, by method, in the order of the methods."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.split == "test":
            found.setdefault(row.method, []).append(row)
    return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of a sample; None for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def table_of(rows: Sequence[Row]) -> str:
    """A table in Markdown, with a line for each method."""
    lines = [
        "| method | top-1 in % | seeds | learning rate | trained | trained in % | step in ms | file in bytes | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in finals(rows).items():
        mean, deviation = mean_and_deviation([row.value for row in own])
        score = f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"
        steps = [row.step_ms for row in own if row.step_ms is not None]
        first = own[0]
        cells = [
            name, score, str(len(own)), f"{first.learning_rate:.3g}", f"{first.trained:,}", f"{first.percent:.3f}",
            f"{sum(steps) / len(steps):.1f}" if steps else "", f"{first.file_bytes:,}", first.note,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
