"""Prints the tables, draws the pictures and writes the documentation's figures from results files.

``python -m benchmarks.draw [FILE ...]``. Nothing is measured. Without arguments, all files in ``benchmarks/results``
that have a picture are drawn, each next to its file, and the generated blocks of README.md and docs/*.md are rewritten.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.gpu.pictures
import benchmarks.kernels.pictures
import benchmarks.training.pictures
from benchmarks.harness.environment import RESULTS
from benchmarks.harness.results import latest, load
from benchmarks.harness.tables import over_baselines
from benchmarks.pages import blocks


def draw(path: Path) -> list[Path]:
    """Draws one results file, whose columns say what it is about; the pictures."""
    rows = latest(load(path))
    columns = rows[0].keys() if rows else ()
    if "kernel" in columns:
        print(over_baselines(rows))
        return benchmarks.kernels.pictures.draw(rows, path.with_suffix(".png"))
    if "step_p50_ms" in columns:
        print(benchmarks.training.pictures.summary(rows))
        return benchmarks.training.pictures.draw(rows, path.with_suffix(".png"))
    if {"part", "extra"} <= set(columns):  # of a GPU; its tables are printed by the run itself
        return benchmarks.gpu.pictures.draw(path, rows)
    return []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draw", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of benchmarks/results")
    files = parser.parse_args().files
    for path in files or sorted(RESULTS.glob("*.csv")):
        for picture in draw(path):
            print(f"\n{picture}\n")
    if not files:
        for page in blocks.rewrite():
            print(page)


if __name__ == "__main__":
    main()
