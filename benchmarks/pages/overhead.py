"""A table about what the Trainer, selection and the command line cost, from ``overhead-cpu.csv``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.results import Row
from benchmarks.pages.figures import duration, paragraph, rows_of, table, where


def costs(results: Path) -> str:
    rows = rows_of(results / "overhead-cpu.csv")

    def order(row: Row) -> tuple[str, str, bool, bool]:
        """Of each comparison the baseline comes first, and what has a goal last."""
        return row["benchmark"], row["size"], row["provider"] != row["baseline"], bool(row["goal"])

    def line(row: Row) -> list[str]:
        named = ", ".join(filter(None, (row["benchmark"], row["size"])))
        return [named, row["provider"], duration(float(row["p50_ms"])), f"{float(row['ratio']):.2f}", row["goal"]]

    source = paragraph(
        f"Medians, measured on {where(rows)}, at a load of {float(rows[0]['load']):.0f} by other programs. Steps and "
        "selection are CPU time of one thread; the ratio is the median over pairs that were measured in turn "
        "([all numbers](../benchmarks/results/overhead-cpu.csv))."
    )
    lines = [line(row) for row in sorted(rows, key=order)]
    return f"{source}\n\n{table(['', '', 'median', 'ratio', 'goal'], lines)}"
