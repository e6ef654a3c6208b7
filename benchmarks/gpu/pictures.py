"""Pictures of a results file, next to it as ``gpu-*.png``. Nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from benchmarks.gpu import adam, topk, weight_grad
from benchmarks.harness import plots
from benchmarks.harness.results import Row, failed

MARKS = "osD^vPX<>hd"
MOST = 4  # axes in a row


def over_k(axes: Axes, rows: Sequence[Row], column: str, providers: Sequence[str], styles: Sequence[str]) -> None:
    """A line for each provider."""
    for provider, style in zip(providers, styles, strict=True):
        own = (row for row in rows if row["provider"] == provider and row[column])
        plots.line(axes, {int(row["k"]): float(row[column]) for row in own}, provider, style)
    plots.k_axis(axes, (int(row["k"]) for row in rows))


def groups(rows: Sequence[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def save(
    rows: Sequence[Row], path: Path, name: str, panels: Sequence[Callable[[Axes], None]], shared_legend: bool = False
) -> Path:
    drawing, all_axes = plots.figure(len(panels), 1 + 4.2 * len(panels), 5.2)
    entries: dict[str, Artist] = {}
    for axes, panel in zip(all_axes, panels, strict=True):
        panel(axes)
        if shared_legend:
            handles, names = axes.get_legend_handles_labels()
            entries |= dict(zip(names, handles, strict=True))
        else:
            plots.legend_below(axes)
    if shared_legend:
        columns = 2 * len(panels)
        drawing.legend(entries.values(), entries, fontsize=7, frameon=False, loc="outside lower center", ncols=columns)
    drawing.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=10)
    target = path.with_name(f"gpu-{name}.png")
    plots.save(drawing, target)
    return target


def draw_topk(rows: Sequence[Row], path: Path) -> Path:
    def panel(key: tuple[str, ...], own: Sequence[Row]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            names = list(dict.fromkeys(row["provider"] for row in sorted(own, key=lambda row: row["provider"])))
            styles = [
                "s--" if name.endswith(topk.BITS) else "^:" if name in (topk.READING, topk.BASELINE) else "o-"
                for name in names
            ]
            over_k(axes, own, "fraction_of_copy", names, styles)
            axes.axhline(topk.TARGET, color=plots.BLACK, linewidth=1, linestyle=":", label="target")
            axes.set_ylim(0)
            axes.set_ylabel("rate, as a fraction of a copy's")
            axes.set_title(f"top-K of rows, {', '.join(key)}", fontsize=10)

        return draw

    return save(rows, path, "topk", [panel(*group) for group in list(groups(rows, "size", "dtype").items())[:MOST]])


def draw_adam(rows: Sequence[Row], path: Path) -> Path | None:
    rows = [row for row in rows if row["operation"] == adam.STEP and row["p50_ms"]]

    def panel(key: tuple[str, ...], own: Sequence[Row]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            names = sorted({row["provider"] for row in own} - {adam.BASELINE})
            styles = ["s--" if "dense" in name else "^:" if "graph" in name else "o-" for name in names]
            over_k(axes, own, "p50_ms", [n for n in names if "alone" not in n],
                   [s for n, s in zip(names, styles, strict=True) if "alone" not in n])  # fmt: skip
            dense = [float(row["p50_ms"]) for row in own if row["provider"] == adam.BASELINE]
            if dense:
                plots.level(axes, statistics.median(dense), adam.BASELINE)  # measured again with every K
            axes.set_yscale("log")
            axes.set_ylabel("a step on the device, milliseconds")
            axes.set_title(", ".join(key), fontsize=10)

        return draw

    cases = list(groups(rows, "size", "dtype").items())[:MOST]
    return save(rows, path, "adam", [panel(*case) for case in cases]) if cases else None


def draw_weight_grad(rows: Sequence[Row], path: Path) -> Path | None:
    styles = {"gather": "o-", "tile": "s-", "union": "^-", "auto": ":"}

    def panel(key: tuple[str, ...], own: Sequence[Row]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            dense = {row["k"]: float(row["p50_ms"]) for row in own if row["provider"] == weight_grad.DENSE}
            over_k(axes, own, "speedup", [], [])
            for name, style in styles.items():
                found = {
                    int(row["k"]): float(row["p50_ms"]) / dense[row["k"]]
                    for row in own
                    if row["provider"].endswith(f", {name}") and row["k"] in dense
                }
                plots.line(axes, found, name, style)
            plots.level(axes, 1, weight_grad.DENSE)
            axes.set_yscale("log")
            axes.set_ylabel("time, as a multiple of the dense product's")
            axes.set_title(", ".join(key), fontsize=9)

        return draw

    cases = list(groups(rows, "size", "dtype").items())[:MOST]
    return save(rows, path, "weight_grad", [panel(*case) for case in cases]) if cases else None


def draw_steps(rows: Sequence[Row], path: Path) -> Path | None:
    """Time of a training step against peak memory, where both were measured."""
    rows = [row for row in rows if "step" in row["operation"] and row["p50_ms"] and row["peak_bytes"]]

    def label(row: Row) -> str:
        return row["provider"] + (f", {row['k']}" if row["k"] not in ("", "0") else "")

    # A method looks the same in all panels: its colour is in the table, its marker tells its variants apart.
    markers: dict[str, str] = {}
    used: dict[str, int] = {}
    for name in sorted(set(map(label, rows)), key=lambda name: ("attached" not in name, name)):
        shade = plots.colour(name)
        markers[name] = MARKS[used.setdefault(shade, 0) % len(MARKS)]
        used[shade] += 1

    def panel(key: tuple[str, ...], own: Sequence[Row]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for row in own:
                name = label(row)
                x, y = int(row["peak_bytes"]) / 1e9, float(row["p50_ms"])
                axes.plot(x, y, markers[name], color=plots.colour(name), label=name, markersize=7, alpha=0.9)
            axes.set_xlim(0)
            axes.set_ylim(0)
            axes.set_xlabel("peak memory, GB")
            axes.set_ylabel("a training step, milliseconds")
            axes.set_title(", ".join(key), fontsize=9)
            axes.grid(True, alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)

        return draw

    cases = list(groups(rows, "part", "size", "dtype").items())[:MOST]
    return save(rows, path, "steps", [panel(*case) for case in cases], shared_legend=True) if cases else None


def draw(path: Path, rows: Sequence[Row]) -> list[Path]:
    """Draws everything that the results have rows for, and returns the pictures."""
    rows = [row for row in rows if not failed(row)]
    drawn: list[Path | None] = []
    for part, figure in (("topk", draw_topk), ("adam", draw_adam), ("weight_grad", draw_weight_grad)):
        own = [row for row in rows if row["part"] == part]
        drawn.append(figure(own, path) if own else None)
    own = [row for row in rows if row["part"] in ("cost", "llama")]
    drawn.append(draw_steps(own, path) if own else None)
    return [picture for picture in drawn if picture is not None]
