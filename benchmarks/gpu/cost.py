"""The part "cost": training and serving ViT-B/16 with every method, batch 32, in float32 and in bfloat16.

The code is that of ``gradsel papers run gps/cost``. The weights are kept in the temporary directory.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.alone import alone
from benchmarks.training.cases import KEPT
from gradsel.experiments.cost import vit
from gradsel.experiments.cost.contenders import Row


def run(context: Any) -> list[Row]:
    return vit.run(context, KEPT)


if __name__ == "__main__":
    alone(run, __doc__.partition("\n")[0])
