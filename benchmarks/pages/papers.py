"""What the papers' experiments would cost on the machine of ``papers-steps-cpu.csv``."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.harness.results import load
from benchmarks.pages.figures import counted, paragraph, rows_of, table, where
from benchmarks.papers.steps import hours

FILE = "papers-steps-cpu.csv"


def costs(results: Path) -> str:
    """Runs, steps and hours of every experiment that trains."""
    lines, unknown = [], []
    for name, (runs, steps, found) in hours(load(results / FILE)).items():
        if math.isnan(found.least):
            unknown.append(f"`{name}`")
            continue
        partly = f", without {counted(len(found.unknown), 'method')}" if found.unknown else ""
        lines.append([
            f"`{name}`", f"{runs:,}", f"{steps:,}", f"{found.hours:,.0f}{partly}",
            " to ".join(dict.fromkeys((f"{found.least:.1f}", f"{found.most:.1f}"))),
        ])  # fmt: skip
    source = paragraph(
        f"On {where(rows_of(results / FILE))} ([every step](../benchmarks/results/{FILE}), "
        "`python -m benchmarks.papers.steps`), with random weights. Steps of few images are scaled to the batch, a "
        "tested sample counts as a third of a trained one, and loading is not counted. Not measured, because only "
        f"image classifiers are: {', '.join(unknown)}."
    )
    return f"{source}\n\n{table(['experiment', 'runs', 'steps', 'hours', 'seconds a step'], lines)}"
