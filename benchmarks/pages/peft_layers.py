"""A table about PEFT's sparse layers, accelerated or not, from ``peft_layers-cpu.csv``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.results import Row
from benchmarks.pages.figures import duration, megabytes, paragraph, rows_of, table, where


def layers(results: Path) -> str:
    rows = rows_of(results / "peft_layers-cpu.csv")
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row["size"], row["adapter"]), {})[row["provider"]] = row
    lines = []
    for (size, adapter), found in sorted(by_case.items(), reverse=True):
        theirs, ours = found["PEFT"], found["accelerated"]
        lines.append(
            [
                f"{size}, {adapter}", duration(float(theirs["p50_ms"])), duration(float(ours["p50_ms"])), ours["ratio"],
                megabytes(int(theirs["saved_bytes"])), megabytes(int(ours["saved_bytes"])),
            ]
        )  # fmt: skip
    source = paragraph(
        f"Medians of {rows[0]['rounds']} interleaved rounds on {where(rows)}, peft {rows[0]['peft']}; the ratio is the "
        "median over pairs ([all numbers](../benchmarks/results/peft_layers-cpu.csv))."
    )
    head = ["float32, forward and backward", "PEFT", "accelerated", "ratio", "saved by PEFT, MB", "accelerated, MB"]
    return f"{source}\n\n{table(head, lines)}"
