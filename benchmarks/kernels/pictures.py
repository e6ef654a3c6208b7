"""Draws the plots and prints the ratio table from a results file: ``python benchmarks/plot.py [results.csv]``.

Everything the README says about speed is printed here from the committed results; nothing is measured.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import common
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
OURS = "native"

Results = dict[tuple[str, str, str, int], dict[str, dict[str, str]]]


def load(path: Path) -> Results:
    """Lines by (kernel, size, dtype, k), then by provider."""
    results: Results = defaultdict(dict)
    for row in common.load(path):
        results[row["kernel"], row["size"], row["dtype"], int(row["k"])][row["provider"]] = row
    return results


def milliseconds(row: dict[str, str]) -> str:
    value = float(row["p50_us"]) / 1000
    return f"{value:.3g} ms"


def table(results: Results) -> str:
    """Markdown: our median, and how many times as long every other provider of the same run takes."""
    lines = [
        "| kernel | size | dtype | K | ours | of copy | others, as a multiple of ours |",
        "|---" * 7 + "|",
    ]
    for (kernel, size, dtype, k), rows in sorted(results.items()):
        ours = rows[OURS]
        others = ", ".join(
            f"{name} {float(row['p50_us']) / float(ours['p50_us']):.3g}x" for name, row in rows.items() if name != OURS
        )
        fraction = ours["fraction_of_copy"]
        lines.append(f"| {kernel} | {size} | {dtype} | {k or ''} | {milliseconds(ours)} | {fraction} | {others} |")
    return "\n".join(lines)


def draw_over_k(axes: Axes, results: Results, kernel: str, size: str, dtype: str, providers: list[str]) -> None:
    """Median time over K, one line a provider, with the 20th to 80th percentile shaded."""
    ks = sorted(k for (name, its_size, its_dtype, k) in results if (name, its_size, its_dtype) == (kernel, size, dtype))
    for provider, colour in zip(providers, COLOURS, strict=False):
        rows = [results[kernel, size, dtype, k][provider] for k in ks]
        p20, p50, p80 = ([float(row[f"p{p}_us"]) / 1000 for row in rows] for p in (20, 50, 80))
        axes.plot(ks, p50, "o-", color=colour, label=provider, markersize=4)
        axes.fill_between(ks, p20, p80, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("K, entries a row")
    axes.set_ylabel("milliseconds")
    axes.set_title(f"{kernel}, {size}, {dtype}", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    topk = ["native", "g.abs().topk", "g.sum", "native, with bits"]
    draw_over_k(left, results, "topk_rows", "3072x768", "float32", topk)
    draw_over_k(middle, results, "topk_rows", "4096x14336", "float32", topk)
    adam = [
        "native",
        "torch Adam(fused), dense",
        "dense mask, then torch Adam(fused)",
        "native, compact gradient and values",
        "gather_rows of weights and gradients",
    ]
    draw_over_k(right, results, "masked_adam_", "ViT-B/16, 86 M", "float32", adam)
    for axes in (left, middle, right):
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    row = next(iter(next(iter(results.values())).values()))
    figure.suptitle(f"{row['device']}, {row['threads']} threads, torch {row['torch']}", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else common.RESULTS / "cpu.csv"
    results = load(path)
    print(table(results))
    picture = path.with_suffix(".png")
    draw(results, picture)
    print(f"\n{picture}")


if __name__ == "__main__":
    main()
