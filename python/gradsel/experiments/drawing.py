"""The picture of a comparison: accuracy against the trained share and against the time of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gradsel.experiments.tidy import Row, mean_and_deviation


def draw(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Draws one mark with error bars for each method.

    Args:
        path: a png file.
        runs: the rows that count, by method.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    share, cost = figure.subplots(1, 2, sharey=True)
    for number, (name, rows) in enumerate(runs.items()):
        mean, deviation = mean_and_deviation([row.value for row in rows])
        steps = [row.step_ms for row in rows if row.step_ms is not None]
        for axes, place in ((share, rows[0].percent), (cost, sum(steps) / len(steps) if steps else None)):
            if place is None:
                continue
            axes.errorbar(place, mean, yerr=deviation or 0.0, fmt="o", color=f"C{number % 10}", capsize=3, label=name)
            axes.annotate(name, (place, mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
    share.set_xscale("log")
    share.set_xlabel("trained parameters in % of the model")
    share.set_ylabel("top-1 accuracy in % (mean ± standard deviation)")
    cost.set_xlabel("milliseconds per step, as measured in these runs")
    for axes in (share, cost):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
