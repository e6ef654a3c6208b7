"""Results files: tidy tables, merged by key. On a GPU the file is also how a run knows what is left to measure."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import ENVIRONMENT, MACHINE, now
from gradsel.experiments.cost.timing import ERROR

# --- Any results file --------------------------------------------------------------------------------------------

Row = dict[str, str]


def load(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merge(
    path: Path, fields: Sequence[str], key: Sequence[str], rows: Sequence[Mapping[str, Any]], ordered: bool = True
) -> None:
    """Adds rows to a file. Rows that it has with the same key are replaced, all others stay.

    The file is replaced as a whole, so that it is complete at any time.

    Args:
        fields: the columns.
        key: the columns by which rows replace each other.
        ordered: sort the rows by key; otherwise new ones come last.
    """
    new = {tuple(str(row[field]) for field in key) for row in rows}
    old = load(path) if path.exists() else []
    merged = [*(row for row in old if tuple(row[field] for field in key) not in new), *rows]
    if ordered:
        merged.sort(key=lambda row: [str(row[field]) for field in key])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    os.replace(temporary, path)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the machine that measured last, because times of two machines do not belong in one picture."""
    if not rows:
        return []
    columns = ("device", "threads") if "threads" in rows[0] else ("device", "torch")
    last = max(rows, key=lambda row: row["date"])
    return [row for row in rows if all(row[name] == last[name] for name in columns)]


# --- Single operations on the CPU --------------------------------------------------------------------------------

#: ``k``: entries a row; 0 for what does not depend on K, such as a baseline: it is measured once for each size and
#: dtype, in the same rounds as every K, and has this one row. ``bytes``: what has to be moved at least.
#: ``fraction_of_copy``: their rate over that of a large copy.
CPU_FIELDS = (
    "kernel", "size", "dtype", "k", "provider", "p20_us", "p50_us", "p80_us", "rounds", "bytes", "gb_per_s",
    "fraction_of_copy", *MACHINE,
)  # fmt: skip
CPU_KEY = ("kernel", "size", "dtype", "k", "provider", "device", "threads")

# --- Everything on a GPU -----------------------------------------------------------------------------------------

#: ``method``: how the device time was taken, see timing.py. ``p20_ms`` to ``p80_ms``: device time of one call (on a CPU
#: the wall clock's). ``wall_p50_ms``: of one call as the caller sees it, the host's work included. ``bytes``: what has
#: to be moved at least. ``fraction_of_copy``: their rate over that of a large copy. ``speedup``: the baseline's median
#: over this one, both from the same rounds. ``peak_bytes``: of training steps all of the memory, of single operators
#: what they need besides their arguments. ``extra``: a few words: tokens/s, launches, or what went wrong, beginning
#: with "error: ".
MEASURES = (
    "method", "p20_ms", "p50_ms", "p80_ms", "wall_p50_ms", "repeats", "bytes", "gb_per_s", "fraction_of_copy",
    "baseline", "speedup", "peak_bytes", "extra",
)  # fmt: skip
CASE = ("part", "operation", "size", "dtype", "k")
FIELDS = (*CASE, "provider", *MEASURES, *ENVIRONMENT)
#: Rows with the same key replace each other: those of newer sources supersede those of older ones.
KEY = (*CASE, "provider", "device", "torch")
#: A backend that cannot run says so; its rows are measured once it can.
OFF = f"{ERROR}off: "
REFUSED = "refused: "


def failed(row: Mapping[str, str]) -> bool:
    return row["extra"].startswith(ERROR)


class Results:
    """The rows of a file that hold for this device, torch and these sources.

    Args:
        path: may not exist yet.
        environment: of this run; written to each of its rows.
        since: only rows from then on count, for a run that measures everything again.
    """

    def __init__(self, path: Path, environment: Mapping[str, str], since: str = "") -> None:
        self.path = path
        self.environment = dict(environment)
        self.since = since
        if path.exists():
            with path.open(newline="") as file:
                header = next(csv.reader(file), [])
            if tuple(header) != FIELDS:
                raise ValueError(f"{path} has other columns than this program writes; name another file by --results")

    def rows(self, part: str | None = None, source: str | None = None) -> list[Row]:
        """The rows of a part, in the order of the file.

        Args:
            source: hash of the sources that a row must be about; None: of what is measured.
        """
        wanted = {name: self.environment[name] for name in ("device", "torch")}
        wanted["source"] = source or self.environment["source"]
        if part is not None:
            wanted["part"] = part
        return [
            row
            for row in (load(self.path) if self.path.exists() else [])
            if row["date"] >= self.since and all(row[name] == value for name, value in wanted.items())
        ]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows at once, because a part may be stopped at any time. Columns that a row lacks stay empty."""
        new = [
            {**dict.fromkeys(FIELDS, ""), **self.environment, "date": now(), **{n: str(v) for n, v in row.items()}}
            for row in rows
        ]
        unknown = {name for row in new for name in row} - set(FIELDS)
        if unknown:
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        merge(self.path, FIELDS, KEY, new, ordered=False)
