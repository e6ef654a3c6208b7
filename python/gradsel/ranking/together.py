"""Ranking the entries of all parameters together."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsel.masks import Mask
from gradsel.ranking.largest import largest, mask_of
from gradsel.ranking.scores import Scores
from gradsel.views import NeuronView


class Together:
    """Ranks the entries of all parameters together, holding at most three times ``count`` candidates.

    Args:
        count: the number of entries to choose.
        names: the parameters, in the order in which ties are broken.
    """

    def __init__(self, count: int, names: list[str]) -> None:
        self._count = count
        self._number = {name: number for number, name in enumerate(names)}
        self._added: dict[str, tuple[torch.device, tuple[int, ...], NeuronView]] = {}
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # magnitudes, numbers of parameters, entries
        self._bound: Tensor | None = None  # what an entry has to reach, if ``count`` have been found

    def add(self, name: str, scores: Scores) -> None:
        self._added[name] = (scores.matrix.device, scores.shape, scores.view)
        magnitudes = scores.matrix.reshape(-1).abs()
        if self._bound is not None:
            entries = (magnitudes >= self._bound.to(magnitudes.device)).nonzero().view(-1)
            entries = entries[largest(magnitudes[entries], self._count)]
        else:
            entries = largest(magnitudes, self._count)
        self._held.append((magnitudes[entries], torch.full_like(entries, self._number[name]), entries))
        if sum(values.numel() for values, _, _ in self._held) > 2 * self._count:
            self._held = [self._best_of_held()]

    def _best_of_held(self) -> tuple[Tensor, Tensor, Tensor]:
        """The ``count`` best of all candidates, in the order of parameters and entries, which breaks ties."""
        device = self._held[0][0].device
        values, numbers, places = (
            torch.cat([part.to(device) for part in parts]) for parts in zip(*self._held, strict=True)
        )
        order = places.argsort(stable=True)
        order = order[numbers[order].argsort(stable=True)]
        order = order[largest(values[order], self._count)]
        if 0 < self._count == order.numel():
            self._bound = values[order].min()
        return values[order], numbers[order], places[order]

    def best(self) -> tuple[Tensor, Tensor]:
        """The chosen entries, the largest magnitude first: the numbers of their parameters, and their places [count].

        A place is the row-major index in the neuron view. Ties are in the order of parameters and places.
        """
        values, numbers, places = self._best_of_held()
        order = values.argsort(descending=True, stable=True)
        return numbers[order], places[order]

    def finish(self) -> dict[str, Mask]:
        masks: dict[str, Mask] = {}
        if not self._held:  # no parameter got a gradient
            return masks
        _, numbers, entries = self._best_of_held()
        for name, (device, shape, view) in self._added.items():
            chosen = entries[numbers == self._number[name]].sort().values.to(device)
            masks[name] = mask_of(chosen, shape, view)
        return masks
