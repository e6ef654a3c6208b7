"""What all pictures share: one table of colours, and axes over K.

A provider has one colour wherever it is drawn; its variants differ in line and marker. Blue is ours on the CPU or as a
method, orange is what torch alone does, pink the published way, grey a bound that nothing can go below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes

from gradsel.demo.plots import BLUE, GREEN, GREY, ORANGE, PINK, SKY
from gradsel.demo.plots import figure as figure
from gradsel.demo.plots import save as save

AMBER, TEAL, WINE, INDIGO, SAND, OLIVE, BLACK = (
    "#e69f00", "#44aa99", "#882255", "#332288", "#b8a13a", "#999933", "#000000",
)  # fmt: skip
#: By the beginning of a provider's or method's name; the longest that fits counts.
COLOURS = {
    # Backends of the kernels
    "native": BLUE,
    "triton": GREEN,
    "cuda": SKY,
    "reference": OLIVE,
    # torch alone
    "g.abs().topk": ORANGE,
    "torch": ORANGE,
    "dense product": ORANGE,
    "full fine-tuning": ORANGE,
    # The published way
    "dense mask": PINK,
    "GPS as published": PINK,
    # Bounds
    "g.sum": GREY,
    "amax": GREY,
    "gather_rows": GREY,
    "floor": GREY,
    # Strategies of selected weight gradients
    "gather": INDIGO,
    "tile": TEAL,
    "union": SAND,
    "auto": BLACK,
    # Methods
    "ours": BLUE,
    "GPS": BLUE,
    "ours, random": TEAL,
    "random": TEAL,
    "ours, rows": WINE,
    "ours, columns": WINE,
    "GRFT": WINE,
    "LoRA": AMBER,
    "SHiRA": INDIGO,
    "linear probe": BLACK,
    "bias": BLACK,
    "SSF": SKY,
    "VPT": GREEN,
    "adapter": OLIVE,
}


def colour(name: str) -> str:
    """The colour of a provider or method.

    Raises:
        KeyError: the table does not have it.
    """
    found = [start for start in COLOURS if name.startswith(start)]
    if not found:
        raise KeyError(f"{name!r} has no colour; add one to COLOURS in benchmarks/harness/plots.py")
    return COLOURS[max(found, key=len)]


def line(axes: Axes, points: Mapping[int, float], name: str, style: str, label: str | None = None) -> None:
    """One provider over K."""
    if points:
        axes.plot(*zip(*sorted(points.items()), strict=True), style, color=colour(name), label=label or name, ms=4)


def level(axes: Axes, height: float, name: str, style: str = "-") -> None:
    """One provider that does not depend on K."""
    axes.axhline(height, color=colour(name), linestyle=style, linewidth=1.5, label=name)


def k_axis(axes: Axes, ks: Iterable[int]) -> None:
    ks = sorted(set(ks))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("K, entries a row")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
