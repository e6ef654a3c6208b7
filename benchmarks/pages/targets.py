"""A table of how near the optimizer's step is to its goals, from ``targets-cpu.csv``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.results import Row
from benchmarks.pages.figures import paragraph, rows_of, table, where

#: How a measured number is written, by its measure.
WRITTEN = {
    "us": "{:,.0f} us",
    "times": "{:.2f}x",
    "faster": "{:.0f}x faster",
    "over": "{:.0f} us more",
    "over each": "{:.2f} us more a tensor",
}
SAMPLED = {"loop": "in a loop of its own", "cold": "caches emptied before"}


def _time(microseconds: float) -> str:
    return f"{microseconds:,.0f} us" if microseconds < 9950 else f"{microseconds / 1000:,.0f} ms"


def goals(results: Path) -> str:
    """One table for each machine, the latest first."""
    machines: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of(results / "targets-cpu.csv"):
        machines.setdefault((row["device"], row["threads"]), []).append(row)
    latest_first = sorted(machines.values(), key=lambda rows: max(row["date"] for row in rows), reverse=True)
    return "\n\n".join(map(_of_machine, latest_first))


def _of_machine(rows: list[Row]) -> str:
    found = {(row["benchmark"], row["size"], row["sampled"], row["provider"]): row for row in rows}

    def line(row: Row) -> list[str]:
        other = found[row["benchmark"], row["size"], row["sampled"], row["baseline"]]
        number, goal = float(row["measured"]), row["goal"]
        if goal:
            limit = float(goal.split()[1].rstrip("x"))
            met = number >= limit if goal.startswith(">=") else number <= limit
            goal += "" if met else ", **missed**"
        return [
            f"{row['benchmark']}: {row['size']}",
            SAMPLED[row["sampled"]],
            f"{row['provider']} {_time(float(row['p50_us']))}",
            f"{row['baseline']} {_time(float(other['p50_us']))}",
            WRITTEN[row["measure"]].format(number),
            goal,
        ]

    source = paragraph(
        f"Medians of interleaved rounds, measured on {where(rows)} "
        "([all numbers](../benchmarks/results/targets-cpu.csv)). What is compared are the medians of the rounds' own "
        "differences and ratios."
    )
    lines = [line(row) for row in rows if row["measure"]]
    return f"{source}\n\n{table(['', '', 'measured', 'against', '', 'goal'], lines)}"
