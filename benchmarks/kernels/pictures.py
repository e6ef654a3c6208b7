"""The picture of the CPU benchmarks: top-K selection and the optimizer step over K. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.harness import plots
from benchmarks.harness.results import Row
from benchmarks.harness.tables import by_shape

#: Panels with their shape, and the style of each provider.
TOPK = {"native": "o-", "native, with bits": "s--", "g.abs().topk": "o-", "g.sum": "-"}
ADAM = {
    "native": "o-",
    "native, attached": "s--",
    "native, compact gradient and values": "^:",
    "torch Adam(fused), dense": "-",
    "dense mask, then torch Adam(fused)": "-",
    "gather_rows of weights and gradients": "o-",
}
PANELS = {
    ("topk_rows", "3072x768", "float32"): TOPK,
    ("topk_rows", "4096x14336", "float32"): TOPK,
    ("masked_adam_", "ViT-B/16, 86 M", "float32"): ADAM,
}


def milliseconds(row: Row, percentile: int = 50) -> float:
    return float(row[f"p{percentile}_us"]) / 1000


def draw_over_k(
    axes: Axes, shape: Sequence[str], by_k: Mapping[int, Mapping[str, Row]], styles: Mapping[str, str]
) -> None:
    """Median time over K with the 20th to 80th percentile shaded; a horizontal line for what does not depend on K."""
    ks = sorted(k for k in by_k if k)
    for name, style in styles.items():
        if name in by_k.get(0, {}):
            row = by_k[0][name]
            plots.level(axes, milliseconds(row), name, style)
            axes.axhspan(milliseconds(row, 20), milliseconds(row, 80), color=plots.colour(name), alpha=0.15, lw=0)
            continue
        rows = {k: by_k[k][name] for k in ks if name in by_k[k]}
        plots.line(axes, {k: milliseconds(row) for k, row in rows.items()}, name, style)
        low, high = ([milliseconds(row, p) for row in rows.values()] for p in (20, 80))
        axes.fill_between(list(rows), low, high, color=plots.colour(name), alpha=0.2, linewidth=0)
    plots.k_axis(axes, ks)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.set_title(", ".join(shape), fontsize=10)
    plots.legend_below(axes)


def draw(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws ``path``; nothing if the results lack one of the panels."""
    shapes = by_shape(rows)
    if any(shape not in shapes for shape in PANELS):
        return []
    drawing, all_axes = plots.figure(len(PANELS), 12, 4.8)
    for axes, (shape, styles) in zip(all_axes, PANELS.items(), strict=True):
        draw_over_k(axes, shape, shapes[shape], styles)
    row = rows[0]
    drawing.suptitle(f"{row['device']}, {row['threads']} threads, torch {row['torch']}", fontsize=10)
    plots.save(drawing, path)
    return [path]
