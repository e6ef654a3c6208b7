"""The experiments by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gradsel.errors import did_you_mean
from gradsel.experiments.papers.experiment import Experiment
from gradsel.experiments.papers.of_gps import GPS
from gradsel.experiments.papers.of_grft import GRFT

#: All of them, GPS's first.
EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType({each.name: each for each in (*GPS, *GRFT)})


def experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        ValueError: there is none such.
    """
    if name not in EXPERIMENTS:
        raise ValueError(
            f"there is no experiment {name!r}{did_you_mean(name, EXPERIMENTS)}; gradsel papers list shows them"
        )
    return EXPERIMENTS[name]
