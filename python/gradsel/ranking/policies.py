"""Policies: how many entries are trained, and which entries compete with each other.

Scores arrive one parameter at a time, in any order. Their magnitudes are ranked; ties go to the lowest column, row or
entry and, between parameters, to the first one of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

import gradsel_kernels as gk
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, PerRow, WholeColumns, WholeRows
from gradsel.ranking.in_proportion import InProportion
from gradsel.ranking.largest import covering_columns, largest, mask_of
from gradsel.ranking.scores import Ranking, Scores, Sizes
from gradsel.ranking.together import Together


class Policy(ABC):
    """How many entries are trained, and which of them compete."""

    @abstractmethod
    def entries(self, rows: int, cols: int) -> int:
        """Number of trained entries of one parameter, from the size of its neuron view."""

    def budget(self, sizes: Iterable[tuple[int, int]]) -> int:
        """Number of trained entries of all parameters with neuron views of these sizes."""
        return sum(self.entries(rows, cols) for rows, cols in sizes)

    def start(self, sizes: Sizes) -> Ranking:
        """Begins a selection among parameters of these sizes."""
        return _OneByOne(self)

    @abstractmethod
    def choose(self, scores: Scores) -> Mask:
        """The mask of one parameter."""

    @property
    def k_of_rows(self) -> int | None:
        """If the mask of a parameter is made of the same number of best entries of every row, that number."""
        return None


class _OneByOne:
    """Ranks parameters that do not compete with each other."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._masks: dict[str, Mask] = {}

    def add(self, name: str, scores: Scores) -> None:
        self._masks[name] = self._policy.choose(scores)

    def finish(self) -> dict[str, Mask]:
        return self._masks


@dataclass(frozen=True)
class _Counted(Policy):
    k: int = 1

    def __post_init__(self) -> None:
        _check_count(f"{type(self).__name__}(k)", "k", self.k)


@dataclass(frozen=True, repr=False)
class PerNeuron(_Counted):
    """The ``k`` best entries of every neuron (row): the mask of GPS, equation 5.

    Args:
        k: entries per neuron; all of them for a neuron with fewer inputs.
        columns: the number of inputs of a matrix that its neurons choose from. With fewer inputs in use, training saves
            fewer activations and multiplies less. The inputs are found greedily: each adds the most to the sum of the
            scores that the neurons then keep, which reaches at least 63 % of the best possible sum (Nemhauser et al.
            1978). None: all inputs, as in GPS.
    """

    columns: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None:
            _check_count("PerNeuron(columns)", "columns", self.columns)
            if self.columns < self.k:
                raise ValueError(f"PerNeuron(k={self.k}, columns={self.columns}) needs at least k columns")

    def __repr__(self) -> str:
        return f"PerNeuron(k={self.k})" if self.columns is None else f"PerNeuron(k={self.k}, columns={self.columns})"

    def entries(self, rows: int, cols: int) -> int:
        return rows * min(self.k, cols)

    @property
    def k_of_rows(self) -> int | None:
        return self.k if self.columns is None else None

    def choose(self, scores: Scores) -> Mask:
        matrix = scores.matrix
        if self.columns is None or self.columns >= matrix.shape[1]:
            return PerRow(gk.topk_rows(matrix, self.k), scores.shape, scores.view)
        columns = covering_columns(matrix, self.k, self.columns)
        inside = gk.topk_rows(matrix[:, columns].contiguous(), self.k)
        return PerRow(columns[inside.long()].to(torch.int32), scores.shape, scores.view)


@dataclass(frozen=True)
class ByMass(_Counted):
    """As many entries as :class:`PerNeuron` in all, and more for every neuron of a layer with a larger gradient.

    All neurons of a parameter have the same number of entries. Each has one, and then parameters are given one more for
    each of their neurons in turns: the next one is always that whose scores have the largest sum of magnitudes for each
    entry that it has. So entries are in proportion to these sums, as in an election by Adams' method. A parameter stops
    at :attr:`MOST` times ``k`` for each neuron, because the best of these are held until all scores have been seen: 8
    bytes for each in float32. If the numbers of neurons leave a remainder that fits no parameter, that many entries,
    fewer than a neuron of the smallest parameter has in all neurons, are not used.

    Args:
        k: entries per neuron in the mean.
    """

    MOST: ClassVar[int] = 8

    def entries(self, rows: int, cols: int) -> int:
        return rows * min(self.k, cols)

    def start(self, sizes: Sizes) -> Ranking:
        return InProportion(self.budget(sizes.values()), self.MOST * self.k, list(sizes))

    def choose(self, scores: Scores) -> Mask:
        return PerNeuron(self.k).choose(scores)


@dataclass(frozen=True)
class _Lines(_Counted):
    """The ``k`` rows or columns of every matrix with the largest sums of squared scores."""

    mask: ClassVar[type[WholeRows] | type[WholeColumns]]

    def entries(self, rows: int, cols: int) -> int:
        sizes, dim = (rows, cols), self.mask.dim
        return min(self.k, sizes[dim]) * sizes[1 - dim]

    def choose(self, scores: Scores) -> Mask:
        matrix = scores.matrix.to(trained_dtype(scores.matrix))  # half precision would round the sums, or overflow
        sums = (matrix if scores.squared else matrix.square()).sum(1 - self.mask.dim)
        return self.mask(gk.topk_rows(sums.unsqueeze(0), self.k)[0], scores.shape, scores.view)


@dataclass(frozen=True)
class Rows(_Lines):
    """The ``k`` best neurons of every matrix, with all their inputs: GRFT, equations 4 to 6.

    A neuron's score is the sum of its squared scores (or of its scores if these are squares: ``"fisher"``).

    Args:
        k: neurons per matrix; all of them in a matrix with fewer.
    """

    mask = WholeRows


@dataclass(frozen=True)
class Columns(_Lines):
    """The ``k`` best inputs of every matrix, for all neurons: GRFT with columns.

    An input's score is the sum of its squared scores (or of its scores if these are squares: ``"fisher"``).

    Args:
        k: inputs per matrix; all of them in a matrix with fewer.
    """

    mask = WholeColumns


@dataclass(frozen=True)
class _Shared(Policy):
    """A number of entries, absolute or as a fraction of all entries."""

    fraction: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.fraction is None) == (self.count is None):
            raise ValueError(f"{name} needs either fraction or count, got fraction={self.fraction}, count={self.count}")
        if self.count is not None:
            _check_count(f"{name}(count)", "count", self.count)
        elif self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"{name}(fraction) needs 0 < fraction <= 1, got {self.fraction}")

    def entries(self, rows: int, cols: int) -> int:
        return self._of(rows * cols)

    def _of(self, total: int) -> int:
        return min(self.count, total) if self.count is not None else round((self.fraction or 0) * total)

    def __repr__(self) -> str:
        given = f"count={self.count}" if self.count is not None else f"fraction={self.fraction:g}"
        return f"{type(self).__name__}({given})"


@dataclass(frozen=True, repr=False)
class PerLayer(_Shared):
    """The best entries of every parameter, regardless of neurons: "layer" in GPS, Tab. 6a.

    Args:
        fraction: fraction of the entries of each parameter, rounded to the nearest count.
        count: entries of each parameter; all of them in one with fewer.
    """

    def choose(self, scores: Scores) -> Mask:
        entries = largest(scores.matrix.reshape(-1), self._of(scores.matrix.numel()))
        return mask_of(entries, scores.shape, scores.view)


@dataclass(frozen=True, repr=False)
class Global(_Shared):
    """The best entries of all parameters together: "net" in GPS, Tab. 6a.

    While a selection runs, it holds 20 bytes for each of the entries that may still be among the best, at most three
    times as many as it selects.

    Args:
        fraction: fraction of the entries of all ranked parameters, rounded to the nearest count.
        count: total number of entries.
    """

    def budget(self, sizes: Iterable[tuple[int, int]]) -> int:
        return self._of(sum(rows * cols for rows, cols in sizes))

    def start(self, sizes: Sizes) -> Ranking:
        return Together(self.budget(sizes.values()), list(sizes))

    def choose(self, scores: Scores) -> Mask:
        ranking = self.start({"": (scores.matrix.shape[0], scores.matrix.shape[1])})
        ranking.add("", scores)
        return ranking.finish()[""]


def equal_budget(policy: type[Policy], like: Policy, sizes: Iterable[tuple[int, int]]) -> Policy:
    """The policy of another class that trains as many entries as ``like``, or as close to it as possible.

    For comparisons at equal budgets, such as those of levels in GPS, Tab. 6a, and of rows with columns in GRFT.

    Args:
        policy: the class: :class:`PerNeuron`, :class:`Rows`, :class:`Columns`, :class:`PerLayer` or :class:`Global`.
        like: the policy whose budget to match.
        sizes: the sizes of the neuron views: ``ranked_sizes(model).values()``.
    """
    sizes = list(sizes)
    wanted = like.budget(sizes)
    if issubclass(policy, _Shared):
        total = sum(rows * cols for rows, cols in sizes)
        return policy(count=wanted) if policy is Global else policy(fraction=wanted / max(total, 1))
    if not issubclass(policy, _Counted):
        raise TypeError(f"policy must be PerNeuron, Rows, Columns, PerLayer or Global, got {policy!r}")
    low, high = 1, max((max(size) for size in sizes), default=1)
    while low < high:  # find the smallest k that takes at least as many
        middle = (low + high) // 2
        if policy(middle).budget(sizes) < wanted:
            low = middle + 1
        else:
            high = middle
    below = policy(max(low - 1, 1))
    return below if wanted - below.budget(sizes) <= policy(low).budget(sizes) - wanted else policy(low)


def _check_count(what: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} needs an integer {name} >= 1, got {value!r}")
