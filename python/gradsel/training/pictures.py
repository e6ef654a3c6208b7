"""The pictures of a report: SVG by matplotlib, in colours that the page sets, so that they follow light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from gradsel.masks import Mask
from gradsel.parameters.blocks import split_names
from gradsel.selection.selection import Selection

#: Width of a picture in inches: it is shown about 350 CSS pixels wide, with text of 11 pixels, on any screen.
_WIDTH = 3.64
#: Classes up to which a confusion matrix has names, and up to which it has numbers.
NAMED, NUMBERED = 40, 15
#: Parts of a matrix in the picture of its rows or columns.
_BINS = 64
#: Matplotlib draws with these colours, and the page's style sheet decides what they look like.
_VARIABLES = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--accent",
    "#050505": "--paper",
}
_SERIES = {f"#0{number}0000": f"--series-{number}" for number in range(1, 9)}
INK, MUTED, LINE, ACCENT, PAPER = _VARIABLES
#: A blue that can be seen on white and on black, for pictures of pixels, which have no variables.
_PIXEL = (70, 125, 235)
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $5
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}


def curve(name: str, lines: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str | None:
    """Values by epoch.

    Args:
        name: of the picture, unique on the page.
        lines: points (epoch, value) by what they are; None is returned if there are none.
        label: what the values are.
    """
    import matplotlib

    drawn = {what: points for what, points in lines.items() if points}
    if not drawn:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.4)
        for (what, points), colour in zip(drawn.items(), _SERIES, strict=False):
            marker = "o" if len(points) <= 40 else ""
            axes.plot(
                *zip(*points, strict=True), color=colour, label=what, linewidth=1.6, marker=marker, markersize=2.5
            )
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.set(xlabel="epoch", ylabel=label)
        if len(drawn) > 1:
            figure.legend(loc="outside upper left", ncols=len(drawn), handlelength=1.2)
        return _svg(figure, name)


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Samples by class (row) and prediction (column), each row shaded by its shares."""
    import matplotlib

    matrix = numpy.array(counts, dtype=float)
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    size = len(classes)
    with matplotlib.rc_context({**_STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        side = _WIDTH if size <= NUMBERED else min(max(0.2 * size, _WIDTH), 8.0)
        figure, axes = _figure(side, side)
        if size > NAMED:
            pixels = numpy.zeros((size, size, 4), numpy.uint8)
            pixels[..., :3] = _PIXEL
            pixels[..., 3] = (255 * shares).round()
            axes.imshow(pixels, interpolation="nearest")
        else:
            for row, column in numpy.ndindex(size, size):
                opacity = 0.05 + 0.6 * shares[row, column]
                axes.add_patch(
                    matplotlib.patches.Rectangle(
                        (column - 0.47, row - 0.47), 0.94, 0.94, facecolor=ACCENT, alpha=opacity, linewidth=0
                    )
                )
                if size <= NUMBERED and matrix[row, column]:
                    weight = "bold" if row == column else "normal"
                    axes.text(column, row, f"{int(matrix[row, column])}", ha="center", va="center", weight=weight)
            names = [_short(each) for each in classes]
            upright = size <= 6 and max(map(len, names)) <= 8
            axes.set_xticks(range(size), names, rotation=0 if upright else 90)
            axes.set_yticks(range(size), names)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal", xlabel="predicted", ylabel="true")
        axes.tick_params(length=0)
        return _svg(figure, "confusion")


def distribution(selection: Selection) -> str | None:
    """The trained entries that were ranked, by block, stacked by type of matrix: the distribution plot of GPS."""
    import matplotlib

    shares = selection.by_block().shares()
    if not shares:
        return None
    blocks = list(next(iter(shares.values())))
    colours = list(_SERIES)
    with matplotlib.rc_context({**_STYLE, "axes.spines.left": False}):
        figure, axes = _figure(0.9 + 0.19 * len(blocks))
        left = numpy.zeros(len(blocks))
        for number, (kind, by_block) in enumerate(shares.items()):
            widths = 100 * numpy.array(list(by_block.values()))
            hatch = ("", "///", "...")[number // len(colours) % 3]
            axes.barh(range(len(blocks)), widths, 0.72, left, color=colours[number % len(colours)],
                      label=_short(kind.removesuffix(".weight"), 24),
                      hatch=hatch, edgecolor=PAPER, linewidth=0.6)  # fmt: skip
            left += widths
        axes.set_yticks(range(len(blocks)), _block_labels(blocks))
        axes.set_ylim(len(blocks) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("% of the selected weights")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1, handlelength=1, handleheight=0.8)
        return _svg(figure, "distribution")


def places(selection: Selection) -> tuple[str, str] | None:
    """Where in each matrix the selected weights lie.

    Returns:
        The picture, and what it shows: ``"inputs"`` or ``"neurons"``. None: no matrix was ranked.
    """
    import matplotlib

    ranked = {name: mask for name, mask in selection.items() if mask.nnz and not mask.is_whole and len(mask.shape) > 1}
    if not ranked:
        return None
    by_rows = all(mask.kind == "rows" for mask in ranked.values())
    strips = numpy.stack([_strip(mask, by_rows) for mask in ranked.values()])
    pixels = numpy.zeros((*strips.shape, 4), numpy.uint8)
    pixels[..., :3] = _PIXEL
    pixels[..., 3] = (255 * numpy.sqrt(strips)).round()  # single entries should be seen beside full parts
    starts = _block_starts(list(ranked), selection)
    with matplotlib.rc_context({**_STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        height = max(0.06 * len(ranked), 0.19 * len(starts))
        figure, axes = _figure(0.9 + min(height, 12))
        axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=(0, 100, len(ranked), 0))
        for line in list(starts.values())[1:]:
            axes.axhline(line, color=LINE, linewidth=0.6)
        ends = [*list(starts.values())[1:], len(ranked)]
        middles = [(start + end) / 2 for start, end in zip(starts.values(), ends, strict=True)]
        axes.set_yticks(middles, _block_labels(list(starts)))
        axes.set_xticks([0, 50, 100])
        axes.tick_params(length=0)
        what = "neurons" if by_rows else "inputs"
        axes.set_xlabel(f"place among the {what} of the matrix, %")
        return _svg(figure, "places"), what


def _strip(mask: Mask, by_rows: bool) -> numpy.ndarray:
    """How many selected entries lie in each part of the rows or columns of a mask, relative to the fullest part."""
    dense = mask.to_dense().cpu()
    view = getattr(mask, "view", None)
    matrix = dense.flatten(1) if view is None else view.of(dense)
    counts = matrix.sum(1 if by_rows else 0).double()
    parts: Tensor = torch.zeros(_BINS, dtype=torch.double)
    bins = torch.arange(_BINS) * len(counts) // _BINS if len(counts) < _BINS else None
    if bins is not None:  # a narrow matrix: every row or column is several parts wide
        parts = counts[bins]
    else:
        parts.index_add_(0, torch.arange(len(counts)) * _BINS // len(counts), counts)
    return (parts / parts.max().clamp(min=1)).numpy()


def _block_starts(names: Sequence[str], selection: Selection) -> dict[str, int]:
    """The first of the names in each block."""
    blocks = {name: place[0] for name, place in split_names(selection).items()}
    starts: dict[str, int] = {}
    for number, name in enumerate(names):
        starts.setdefault(blocks[name], number)
    return starts


def _block_labels(blocks: Sequence[str]) -> list[str]:
    """The names of blocks without the modules that all of them are in, but for the last: ``blocks.0``, ``layer.0``."""
    parts = [name.split(".") for name in blocks if name]
    common = 0
    while parts and all(len(part) > common + 2 and part[common] == parts[0][common] for part in parts):
        common += 1
    return [".".join(name.split(".")[common:]) if name else "outside" for name in blocks]


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _figure(height: float, width: float = _WIDTH) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, name: str) -> str:
    """The figure as an SVG element for a page: no namespaces, metadata or fixed size, colours by variables."""

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser's fonts show the text
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"font: ((?:[\w ]+ )?[\d.]+px) [^;\"]+", r"font: \1 var(--sans)", text)
    for colour, variable in {**_VARIABLES, **_SERIES}.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
