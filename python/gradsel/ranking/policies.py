"""Policies: how many entries are trained, and which entries compete with each other.

Scores arrive one parameter at a time, in any order. Their magnitudes are ranked; ties go to the lowest column, row or
entry and, between parameters, to the first one of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.dtypes import trained_dtype
from gradsel.masks import Flat, Frozen, Mask, PerRow, Whole, WholeColumns, WholeRows
from gradsel.views import NeuronView

#: Number of columns whose gains are recomputed together.
_LOOK_AT = 32

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


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest magnitudes of a vector without NaN: int64, ascending, ties to the lowest."""
    if count >= values.numel():
        return torch.arange(values.numel(), device=values.device)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    magnitudes = values.abs()
    group = min(magnitudes.numel() // (2 * count), 64)
    if group < 4:
        return _largest_of(magnitudes, count)
    # At least ``count`` entries reach the bound, one per peak that does, so the largest are among those that reach it.
    peaks = magnitudes[: magnitudes.numel() // group * group].view(-1, group).amax(1)
    bound = peaks.topk(count, sorted=False).values.min()
    candidates = (magnitudes >= bound).nonzero().view(-1)
    return candidates[_largest_of(magnitudes[candidates], count)]


def _largest_of(magnitudes: Tensor, count: int) -> Tensor:
    threshold = magnitudes.topk(count, sorted=False).values.min()
    above = (magnitudes > threshold).nonzero().view(-1)
    ties = (magnitudes == threshold).nonzero().view(-1)[: count - above.numel()]
    return torch.cat([above, ties]).sort().values


def covering_columns(score: Tensor, k: int, count: int) -> Tensor:
    """The columns in which the ``k`` largest magnitudes of every row have the largest sum, found greedily.

    That sum is submodular in the set of columns: a column never gains more later than it did before. So only columns
    whose old gain still leads are evaluated again (Minoux 1978).

    Args:
        score: finite [rows, cols].
        k: entries per row.
        count: number of columns.

    Returns:
        int64 [count], ascending.
    """
    columns = score.abs().t().contiguous()  # [cols, rows]: one column is read at a time
    columns = columns.to(trained_dtype(columns))
    kept = columns.new_zeros(k, columns.shape[1])  # the best of every row in the chosen columns, ascending
    gains = columns.sum(1, dtype=torch.float64).cpu().numpy()
    seen_with = numpy.zeros(len(columns), dtype=int)  # number of chosen columns when each gain was computed
    chosen: list[int] = []
    while len(chosen) < min(count, len(columns)):
        best = int(gains.argmax())  # the first of equal ones
        if seen_with[best] == len(chosen):
            kept = torch.cat([kept, columns[best : best + 1]]).sort(0).values[1:]
            gains[best] = -1.0
            chosen.append(best)
        else:
            leading = numpy.argpartition(-gains, min(_LOOK_AT, len(gains)) - 1)[:_LOOK_AT]
            leading = numpy.union1d(leading, [best])  # among equal ones, argpartition may not take the first
            stale = leading[(seen_with[leading] != len(chosen)) & (gains[leading] >= 0)]
            added = columns[torch.from_numpy(stale).to(columns.device)].sub_(kept[0]).clamp_(min=0)
            gains[stale] = added.sum(1, dtype=torch.float64).cpu().numpy()
            seen_with[stale] = len(chosen)
    return torch.tensor(sorted(chosen), dtype=torch.int64, device=score.device)


def mask_of(entries: Tensor, shape: tuple[int, ...], view: NeuronView) -> Mask:
    """The mask of some entries, given by their row-major indices in the neuron view."""
    if entries.numel() == 0:
        return Frozen(shape, "nothing selected")
    if entries.numel() == math.prod(shape):
        return Whole(shape)
    if view.is_leading:
        return Flat(entries, shape)
    dense = torch.zeros(view.shape(shape), dtype=torch.bool, device=entries.device)
    dense.view(-1)[entries] = True
    return Flat.from_dense(view.undo(dense, shape))


def _check_count(what: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} needs an integer {name} >= 1, got {value!r}")
