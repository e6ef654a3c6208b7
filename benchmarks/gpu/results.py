"""The results file: one tidy table for every part, merged by key, which is also how a run knows what is left to do."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import load
from environment import ENVIRONMENT, now

#: ``method``: how the device time was taken, see timing.py. ``p20_ms`` to ``p80_ms``: device time of one call (on a CPU
#: the wall clock's). ``wall_p50_ms``: of one call as the caller sees it, the host's work included. ``bytes``: what has
#: to be moved at least. ``fraction_of_copy``: their rate over that of a large copy. ``speedup``: the baseline's median
#: over this one. ``peak_bytes``: of training steps all of the memory, of single operators what they need besides their
#: arguments. ``extra``: a few words: tokens/s, launches, or what went wrong, beginning with "error: ".
MEASURES = (
    "method", "p20_ms", "p50_ms", "p80_ms", "wall_p50_ms", "repeats", "bytes", "gb_per_s", "fraction_of_copy",
    "baseline", "speedup", "peak_bytes", "extra",
)  # fmt: skip
CASE = ("part", "operation", "size", "dtype", "k")
FIELDS = (*CASE, "provider", *MEASURES, *ENVIRONMENT)
#: Lines with the same key replace each other: newer sources supersede older ones.
KEY = (*CASE, "provider", "device", "torch")
ERROR = "error: "
#: A backend that cannot run says so; its lines are measured once it can.
OFF = f"{ERROR}off: "
REFUSED = "refused: "

Row = dict[str, str]


def failed(row: Mapping[str, str]) -> bool:
    return row["extra"].startswith(ERROR)


def rounded(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


class Results:
    """The lines of a file that hold for this device, torch and these sources.

    Args:
        path: may not exist yet.
        environment: of this run; written to each of its lines.
        since: only lines from then on count, for a run that measures everything anew.
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
        """Those of a part, in the order of the file.

        Args:
            source: hash of the sources that a line must be about; None: of what is measured.
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
        """Writes lines at once: a part may be stopped at any time. Columns that a row lacks stay empty."""
        new = [
            {**dict.fromkeys(FIELDS, ""), **self.environment, "date": now(), **{n: str(v) for n, v in row.items()}}
            for row in rows
        ]
        unknown = {name for row in new for name in row} - set(FIELDS)
        if unknown:
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        keys = {tuple(row[name] for name in KEY) for row in new}
        old = load(self.path) if self.path.exists() else []
        kept = [row for row in old if tuple(row[name] for name in KEY) not in keys]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *new])
        os.replace(temporary, self.path)
