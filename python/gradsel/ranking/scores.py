"""What policies are given and return: scores of one parameter at a time, and masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gradsel.masks import Mask
from gradsel.views import NeuronView

#: Rows and columns of the neuron views that a policy chooses from, by parameter.
Sizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one parameter.

    Attributes:
        matrix: finite scores [rows, cols], one for each entry of the neuron view.
        shape: shape of the parameter.
        view: its neuron view.
        squared: the scores are squares already.
    """

    matrix: Tensor
    shape: tuple[int, ...]
    view: NeuronView
    squared: bool = False


class Ranking(Protocol):
    """A running selection: takes scores, one parameter at a time, and returns masks."""

    def add(self, name: str, scores: Scores) -> None:
        """Takes the scores of the parameter ``name``, without keeping the matrix."""

    def finish(self) -> dict[str, Mask]:
        """A mask for every parameter that was added."""
