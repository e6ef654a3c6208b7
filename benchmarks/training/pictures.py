"""What ``train_step.py`` has measured: as a table, against its targets, and as a picture. Nothing is measured here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from benchmarks.harness import plots
from benchmarks.harness.results import Row

#: Name in the picture and marker of every method, in the order of the table.
STYLE = {
    ("floor", 0): ("floor", "D"),
    ("full fine-tuning", 0): ("full fine-tuning", "s"),
    ("GPS as published", 1): ("GPS as published", "o"),
    ("linear probe", 0): ("linear probe", "o"),
    ("LoRA", 8): ("LoRA, r = 8", "s"),
    ("SHiRA", 1): ("SHiRA", "o"),
    ("ours", 1): ("ours, K = 1", "o"),
    ("ours", 2): ("K = 2", "o"),
    ("ours", 5): ("K = 5", "o"),
    ("ours", 10): ("K = 10", "o"),
    ("ours, random", 1): ("random K = 1", "o"),
    ("ours, rows", 3): ("3 rows", "^"),
    ("ours, columns", 3): ("3 columns", "v"),
}
PROBE = ("linear probe", 0)
STATE = ("gradient_bytes", "optimizer_bytes", "mask_bytes")


def by_size(rows: Sequence[Row]) -> dict[str, dict[tuple[str, int], Row]]:
    """Rows by size, then by method and K in the order of STYLE."""
    sizes: dict[str, dict[tuple[str, int], Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: list(STYLE).index((row["method"], int(row["k"])))):
        sizes[row["size"]][row["method"], int(row["k"])] = row
    return sizes


def megabytes(row: Row, *columns: str) -> float:
    return sum(int(row[column]) for column in columns) / 1e6


def table(rows: dict[tuple[str, int], Row]) -> str:
    """Markdown."""
    lines = [
        "| method | K or r | trained | step, ms | of full | of LoRA | of the floor | saved, MB | gradients, state and "
        "masks, MB | peak, MB | a task's file (of a ViT with 10 classes), MB | inputs read, % |",
        "|---" * 12 + "|",
    ]
    for (method, k), row in rows.items():
        cells = [
            method, k or "", f"{int(row['trained']):,}", f"{float(row['step_p50_ms']):.0f}",
            *(f"{float(row[f'ratio_to_{other}']):.2f}" for other in ("full", "lora", "floor")),
            f"{megabytes(row, 'saved_bytes'):.1f}", f"{megabytes(row, *STATE):.2f}",
            f"{megabytes(row, 'peak_bytes'):.0f}", f"{megabytes(row, 'checkpoint_bytes'):.2f}",
            row["used_columns_percent"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def targets(rows: dict[tuple[str, int], Row]) -> list[tuple[str, float, float]]:
    """Each target in words, the figure that was reached, and the most it may be."""
    ours, published, random = rows["ours", 1], rows["GPS as published", 1], rows["ours, random", 1]
    lora = rows["LoRA", 8]

    def step(row: Row) -> float:
        return float(row["step_p50_ms"])

    everything = ("saved_bytes", *STATE)
    return [
        ("K = 1: step over full fine-tuning's", float(ours["ratio_to_full"]), 0.70),
        ("K = 1: step over LoRA's", float(ours["ratio_to_lora"]), 0.78),
        ("K = 1: step over the floor's", float(ours["ratio_to_floor"]), 1.05),
        ("K = 1: saved bytes over LoRA's", megabytes(ours, "saved_bytes") / megabytes(lora, "saved_bytes"), 0.65),
        ("K = 1: gradients, state and masks over the weights, %",
         100 * megabytes(ours, *STATE) / megabytes(ours, "weights_bytes"), 1.5),
        ("K = 10: step over LoRA's", float(rows["ours", 10]["ratio_to_lora"]), 1.0),
        ("random K = 1: step over GPS as published", step(random) / step(published), 1.0),
        ("random K = 1: memory over GPS as published",
         megabytes(random, *everything) / megabytes(published, *everything), 1.0),
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """Table and targets of every size."""
    parts = []
    for size, methods in by_size(rows).items():
        first = next(iter(methods.values()))
        where = f"{first['device']}, {first['threads']} threads, {first['rounds']} rounds"
        parts.append(f"{size} ({megabytes(first, 'weights_bytes'):.0f} MB of weights; {where})\n\n{table(methods)}\n")
        for words, reached, most in targets(methods):
            verdict = "met" if reached <= most else "MISSED"
            parts.append(f"{verdict:<7}{words}: {reached:.2f}, at most {most:.2f}")
        parts.append("")
    return "\n".join(parts).rstrip()


def places(rows: dict[tuple[str, int], Row]) -> dict[tuple[str, int], tuple[float, float, str]]:
    """Time, memory and name of every method. The linear probe, far below all others, is moved up."""
    dots = {
        method: (float(row["step_p50_ms"]), megabytes(row, "saved_bytes", *STATE), STYLE[method][0])
        for method, row in rows.items()
    }
    lowest = min(height for method, (_, height, _) in dots.items() if method != PROBE) / 1.5
    time, height, name = dots[PROBE]
    if height < lowest:
        dots[PROBE] = (time, lowest, f"{name} (at {height:.0f} MB)")
    return dots


def draw_size(axes: Axes, size: str, rows: dict[tuple[str, int], Row]) -> None:
    """Every method as a dot, with the 20th to 80th percentile of its time; a line joins ours over K."""
    dots = places(rows)
    for method, (time, height, _) in dots.items():
        colour, marker = plots.colour(method[0]), STYLE[method][1]
        low, high = (float(rows[method][f"step_p{p}_ms"]) for p in (20, 80))
        axes.errorbar(
            time, height, xerr=[[time - low], [high - time]], fmt=marker, color=colour, markersize=7, elinewidth=1
        )
    ours = [(time, height) for method, (time, height, _) in dots.items() if method[0] == "ours"]
    axes.plot(*zip(*ours, strict=True), color=plots.colour("ours"), linewidth=1.5, alpha=0.5)
    axes.axvline(dots["floor", 0][0], color=plots.colour("floor"), linewidth=1, linestyle=":")
    axes.set_xlim(0, 1.06 * max(float(row["step_p80_ms"]) for row in rows.values()))
    heights = [height for _, height, _ in dots.values()]
    axes.set_yscale("log")
    axes.set_ylim(min(heights) / 1.15, max(heights) * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(size, fontsize=11)
    axes.set_xlabel("one training step, ms (strokes: 20th to 80th percentile)")
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Axes, rows: dict[tuple[str, int], Row]) -> None:
    """Writes each method's name in the nearest place to its dot where it covers no other name and no dot."""
    dots = places(rows)
    renderer = axes.figure.canvas.get_renderer()
    inside, halo = axes.get_window_extent(), withStroke(linewidth=2.5, foreground="white")
    pixels = dict(zip(dots, axes.transData.transform([dot[:2] for dot in dots.values()]), strict=True))
    taken = {method: Bbox.from_extents(x - 10, y - 10, x + 10, y + 10) for method, (x, y) in pixels.items()}
    offsets = [(side * far, up) for far in (9, 20, 40, 65, 95) for up in range(-120, 121, 8) for side in (1, -1)]
    offsets.sort(key=lambda offset: offset[0] ** 2 + (1.5 * offset[1]) ** 2 - offset[0])  # the right is preferred
    for method in sorted(dots, key=lambda method: -pixels[method][1]):
        *place, name = dots[method]
        colour = plots.colour(method[0])
        for x, y in offsets:
            line = None if abs(y) <= 8 and abs(x) == 9 else {"arrowstyle": "-", "color": colour, "alpha": 0.5}
            text = axes.annotate(
                name, place, (x, y), textcoords="offset points", fontsize=8.5, color=colour, path_effects=[halo],
                va="center", ha="left" if x > 0 else "right", arrowprops=line,
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(3)  # the text alone, without its line
            free = not any(box.overlaps(other) for own, other in taken.items() if own != method)
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                taken[method, "name"] = box
                break
            text.remove()


def draw(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws ``path``, one panel for each size."""
    sizes = by_size(rows)
    figure, panels = plots.figure(len(sizes), 6.2 * len(sizes), 5.6)
    panels[0].set_ylabel("saved activations, gradients, optimizer state and masks, MB (log)")
    where = f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}"
    figure.suptitle(f"Time and memory of a training step: {where}", fontsize=10)
    for axes, (size, methods) in zip(panels, sizes.items(), strict=True):
        draw_size(axes, size, methods)
    figure.draw_without_rendering()  # makes the layout, which places on the page depend on
    for axes, methods in zip(panels, sizes.values(), strict=True):
        label(axes, methods)
    plots.save(figure, path)
    return [path]
