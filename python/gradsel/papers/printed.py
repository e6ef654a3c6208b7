"""What the papers print: the numbers of their tables, and those that the text states, with their sources.

All of them are in ``printed.json``, beside this file, as the papers print them; nothing else in the project holds one.
The papers are "Gradient-based Parameter Selection for Efficient Fine-Tuning" (GPS, CVPR 2024) and "Gradient-based and
Regularized Fine-Tuning" (GRFT).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources


@dataclass(frozen=True)
class Printed:
    """A table of a paper.

    Attributes:
        source: paper and table, or section.
        metric: what its numbers are: ``"top1"`` in percent, ``"difference"`` of two methods, ...
        columns: data sets, means and trained shares, in the paper's order and under this project's names.
        rows: the numbers by method; None where the paper has none.
        deviations: standard deviations, where the paper has them.
        scale: what a number is multiplied by to be in the units of ours.
    """

    source: str
    metric: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]
    deviations: Mapping[str, Sequence[float]] = field(default_factory=dict)
    scale: float = 1.0

    def value(self, row: str, column: str) -> float | None:
        """The number of a method on a data set in our units; None if the paper has none."""
        if row not in self.rows or column not in self.columns:
            return None
        found = self.rows[row][self.columns.index(column)]
        # Means and accuracies are fractions where there is a scale; shares are in percent anyway.
        return found if found is None or column.endswith("(%)") else found * self.scale


@functools.cache
def printed() -> Mapping[str, Printed]:
    """All tables by the name of the experiment, such as ``gps/table2``."""
    text = resources.files("gradsel.papers").joinpath("printed.json").read_text(encoding="utf-8")
    return {name: Printed(**values) for name, values in json.loads(text).items()}
