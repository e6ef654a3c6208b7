"""The blocks of the page on numerics: how far the C++ backend is from the specification."""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages.figures import rows_of, table


def distances(results: Path) -> str:
    return table(
        ("step with", "steps", "problems", "median", "99 %", "largest", "above 2", "above 4"),
        [
            [row[name] for name in ("kind", "steps", "problems", "median", "p99", "largest", "above_2", "above_4")]
            for row in rows_of(results / "numerics-adam-cpu.csv")
        ],
    )


def products(results: Path) -> str:
    return table(
        ("strategy", "problems", "median", "99 %", "largest", "above 1"),
        [
            [row[name] for name in ("strategy", "problems", "median", "p99", "largest", "above_1")]
            for row in rows_of(results / "numerics-weight-grad-cpu.csv")
        ],
    )
