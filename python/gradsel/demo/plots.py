"""Pictures of selections and of what they reach. Each function draws on the axes it is given."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by all common kinds of colour vision.
GREY, ORANGE, BLUE, GREEN, PINK, SKY = "#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9"
# Types of matrices have colours of their own (Tol's muted ones), because the others stand for methods.
_TYPES = ("#332288", "#44aa99", "#ddcc77", "#cc6677", "#999933", "#882255")
_FILLS = [(colour, hatch) for hatch in ("", "//", "..", "xx") for colour in _TYPES]


def figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with a row of axes; it belongs to nobody's pyplot."""
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, list(drawing.subplots(1, columns, squeeze=False)[0])


def accuracies(
    axes: Axes, runs: Mapping[str, Sequence[float]], notes: Mapping[str, str], colours: Mapping[str, str]
) -> None:
    """Mean, standard deviation and single runs of every method, first method on top.

    Args:
        runs: accuracies in percent, by method.
        notes: a few words below each method's name.
        colours: by method.
    """
    for place, (method, values) in enumerate(runs.items()):
        mean = sum(values) / len(values)
        spread = (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
        axes.errorbar(mean, place, xerr=spread, fmt="o", color=colours[method], markersize=8, capsize=4, linewidth=2)
        axes.plot(values, [place + 0.2] * len(values), "|", color=colours[method], markersize=8, alpha=0.8)
        axes.text(mean, place - 0.17, f"{mean:.1f}", ha="center", va="bottom", weight="bold")
    axes.set_yticks(range(len(runs)), [f"{method}\n{notes[method]}" for method in runs])
    axes.set_ylim(len(runs) - 0.5, -0.6)
    axes.set_xlabel("test accuracy in %  (mean ± standard deviation; strokes: single runs)")
    _tidy(axes)


def used_columns(axes: Axes, shares: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:
    """For every matrix the share of its inputs that a selection reads, one mark a method, first matrix on top.

    Args:
        shares: percent of the columns, by method and by the parameter's name.
        colours: by method.
    """
    names = list(next(iter(shares.values())))
    for place, name in enumerate(names):
        ends = [share[name] for share in shares.values()]
        axes.plot([min(ends), max(ends)], [place, place], color="#d0d0d0", linewidth=2, zorder=1)
    for (method, share), marker in zip(shares.items(), "osD^v", strict=False):
        values = [share[name] for name in names]
        axes.plot(values, range(len(names)), marker, color=colours[method], label=method, markersize=6)
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names])
    axes.set_ylim(len(names) - 0.5, -1.7)  # the legend goes on top, where no mark can be
    axes.set_xlim(0, 103)
    axes.set_xlabel("input columns with at least one selected weight, in %")
    axes.legend(loc="upper center", ncols=len(shares), frameon=False, fontsize=9)
    _tidy(axes)


def distribution(axes: Axes, shares: Mapping[str, Mapping[str, float]]) -> None:
    """The share of the selected ranked weights in every block, stacked by type of matrix, in model order.

    Args:
        shares: by type and block, of one selection: ``selection.by_block().shares()``.
    """
    blocks = list(next(iter(shares.values()), {}))
    heights = [0.0] * len(blocks)
    for number, (kind, by_block) in enumerate(shares.items()):
        percent = [100 * share for share in by_block.values()]
        colour, hatch = _FILLS[number % len(_FILLS)]
        axes.bar(range(len(blocks)), percent, bottom=heights, color=colour, hatch=hatch, edgecolor="white", label=kind)
        heights = [height + more for height, more in zip(heights, percent, strict=True)]
    axes.set_xticks(range(len(blocks)), [block or "outside" for block in blocks], rotation=90)
    axes.set_ylabel("share of the selected weights in %")
    if shares:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)  # bars fill the axes
    axes.spines[["top", "right"]].set_visible(False)


def overlap(axes: Axes, names: Sequence[str], matrix: Sequence[Sequence[float]]) -> None:
    """How much selections have in common, two by two, as a heat map with figures.

    Args:
        names: of the selections.
        matrix: ``Overlap.share`` or ``Overlap.jaccard`` of every pair, [len(names)][len(names)], 0 to 1 or NaN.
    """
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for row, shares in enumerate(matrix):
        for column, share in enumerate(shares):
            colour = "white" if share > 0.6 else "black"
            text = "-" if math.isnan(share) else f"{100 * share:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title("selected weights in common, in %")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def save(drawing: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure; the suffix says in which format."""
    drawing.savefig(path, dpi=130)


def _tidy(axes: Axes) -> None:
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
