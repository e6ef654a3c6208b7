"""Ranking each parameter's neurons by themselves, with entries in proportion to the parameter's scores."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.masks import Mask, PerRow
from gradsel.ranking.scores import Scores
from gradsel.views import NeuronView


@dataclass(frozen=True)
class _Held:
    """The best entries of every neuron of a parameter: their columns, ascending, and scores, both [rows, held]."""

    columns: Tensor
    scores: Tensor
    mass: float
    shape: tuple[int, ...]
    view: NeuronView


class InProportion:
    """Gives every neuron of a parameter the same number of entries; see :class:`gradsel.ranking.policies.ByMass`.

    Args:
        count: the number of entries to choose, at most.
        most: the largest number of entries for each neuron.
        names: the parameters, in the order in which ties are broken.
    """

    def __init__(self, count: int, most: int, names: list[str]) -> None:
        self._count, self._most, self._names = count, most, names
        self._held: dict[str, _Held] = {}

    def add(self, name: str, scores: Scores) -> None:
        matrix = scores.matrix
        columns = gk.topk_rows(matrix, self._most)
        mass = float(matrix.abs().sum(dtype=torch.float64))
        self._held[name] = _Held(columns, gk.gather_rows(matrix, columns), mass, scores.shape, scores.view)

    def finish(self) -> dict[str, Mask]:
        names = [name for name in self._names if name in self._held]
        shares = in_proportion(
            {name: (self._held[name].columns.shape[0], self._held[name].columns.shape[1]) for name in names},
            {name: self._held[name].mass for name in names},
            self._count,
        )
        masks: dict[str, Mask] = {}
        for name, k in shares.items():
            held = self._held[name]
            best = gk.topk_rows(held.scores, max(k, 1)).long()  # columns ascend, so ties go to the lowest
            masks[name] = PerRow(held.columns.gather(1, best), held.shape, held.view)
        return masks


def in_proportion(sizes: Mapping[str, tuple[int, int]], masses: Mapping[str, float], count: int) -> dict[str, int]:
    """Entries for each row of some matrices, in proportion to their masses, at least 1.

    Args:
        sizes: rows and the most entries of a row, by matrix, in the order in which ties are broken.
        masses: not negative.
        count: the most entries of all matrices together.
    """
    shares = {name: min(1, most) for name, (_, most) in sizes.items()}
    left = count - sum(rows * shares[name] for name, (rows, _) in sizes.items())
    # By mass for each entry that a matrix has, the largest first; equal ones in the order of the matrices.
    waiting = [
        (-masses[name] / rows, number, name) for number, (name, (rows, most)) in enumerate(sizes.items()) if rows * most
    ]
    heapq.heapify(waiting)
    while waiting:
        _, number, name = heapq.heappop(waiting)
        rows, most = sizes[name]
        if rows > left or shares[name] == most:
            continue
        shares[name] += 1
        left -= rows
        heapq.heappush(waiting, (-masses[name] / (rows * shares[name]), number, name))
    return shares
