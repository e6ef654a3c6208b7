"""What every benchmark here shares: the clock, the name of the machine, and results files that are merged."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gradsel_kernels as gk

RESULTS = Path(__file__).parent / "results"
#: Columns that :func:`machine` fills.
MACHINE = ("device", "threads", "torch", "gradsel_kernels", "date")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Where, with what and when something was measured."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gradsel_kernels": gk.__version__,
        "date": datetime.date.today().isoformat(),
    }


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, the 50th and the 80th."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def load(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merge(path: Path, fields: Sequence[str], key: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``rows``; of those in the file already, the ones with another key stay."""
    new = {tuple(str(row[field]) for field in key) for row in rows}
    kept = [row for row in load(path) if tuple(row[field] for field in key) not in new] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=lambda row: [str(row[field]) for field in key]))
