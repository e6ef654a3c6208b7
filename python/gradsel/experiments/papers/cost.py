"""The cost figure of GPS as an experiment: a number for each method, operation and dtype."""

from __future__ import annotations

import math

from gradsel.errors import RunError
from gradsel.experiments.cost import vit
from gradsel.experiments.cost.comparing import Alone
from gradsel.experiments.papers.selections import Measured
from gradsel.training.config import Config
from gradsel.training.parts import device_of


def measured(config: Config, small: bool) -> Measured:
    """Medians of a training step and of inference by method, in milliseconds, and the peak bytes of tensors.

    Raises:
        RunError: nothing could be measured.
    """
    # There is no deadline: whatever is left out would have to wait for everything else to be measured again.
    rows = vit.run(Alone(device_of(config).type, small, math.inf))
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
