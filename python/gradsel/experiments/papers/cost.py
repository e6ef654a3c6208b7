"""The cost figure of GPS, by the code of the GPU benchmarks, which runs on a CPU as well."""

from __future__ import annotations

import importlib
import time
from typing import Any

from gradsel.errors import RunError
from gradsel.experiments.papers.selections import Measured
from gradsel.training.config import Config
from gradsel.training.parts import device_of

#: After which no further comparison starts.
SECONDS = 3600.0


def measured(config: Config, small: bool) -> Measured:
    """Medians of a training step and of inference by method, in milliseconds, and peak bytes where there is a GPU.

    Raises:
        RunError: the benchmarks, which are in the repository and not in the package, are not there.
    """
    try:
        cost: Any = importlib.import_module("benchmarks.gpu.cost")
        steps: Any = importlib.import_module("benchmarks.training.steps")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "benchmarks":
            raise
        raise RunError(
            "gps/cost needs the benchmarks, which only the repository has; run python -m gradsel there"
        ) from None
    rows = cost.run(steps.Alone(device_of(config).type, small, time.monotonic() + SECONDS))
    values = {}
    for row in rows:
        if "p50_ms" in row:
            name = f"{row['operation']}, {row['dtype']}: {row['method']}" + (f", k={row['k']}" if row["k"] else "")
            values[f"{name}, ms"] = float(row["p50_ms"])
            if "peak_bytes" in row:
                values[f"{name}, peak MB"] = row["peak_bytes"] / 2**20
    if not values:
        raise RunError("gps/cost: nothing could be measured; the lines above say why")
    return Measured(values, {})
