"""Policies: how many entries are trained, and at which level they compete for it.

Scores come one parameter at a time, in any order, as neuron views [rows, cols]. What counts is their magnitude; ties go
to the lowest column, row or entry, and between parameters to the first one of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.dtypes import trained_dtype
from gradsel.masks import Flat, Frozen, Mask, PerRow, Whole, WholeColumns, WholeRows
from gradsel.views import NeuronView

#: Columns whose gain is worked out anew at a time.
_LOOK_AT = 32

#: Rows and columns of the neuron views that a policy chooses from, by parameter.
Sizes = Mapping[str, tuple[int, int]]


class Ranking(Protocol):
    """A selection in the making: scores go in, one parameter at a time, and masks come out."""

    def add(self, name: str, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> None:
        """Takes in the scores of one parameter.

        Args:
            name: the parameter.
            score: finite scores [rows, cols]; not kept.
            shape: shape of the parameter.
            view: its neuron view.
            squared: scores are squares already.
        """

    def finish(self) -> dict[str, Mask]:
        """A mask for every parameter that was added."""


class Policy(ABC):
    """How many entries of what."""

    @abstractmethod
    def entries(self, rows: int, cols: int) -> int:
        """Number of entries of one parameter, by the size of its neuron view."""

    def budget(self, sizes: Iterable[tuple[int, int]]) -> int:
        """Number of entries of all parameters with neuron views of these sizes."""
        return sum(self.entries(rows, cols) for rows, cols in sizes)

    def start(self, sizes: Sizes) -> Ranking:
        """Begins a selection among parameters of these sizes."""
        return _OneByOne(self)

    @abstractmethod
    def choose(self, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> Mask:
        """The mask of one parameter from its scores; arguments as in :meth:`Ranking.add`."""


class _OneByOne:
    """Parameters that do not compete with one another."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._masks: dict[str, Mask] = {}

    def add(self, name: str, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> None:
        self._masks[name] = self._policy.choose(score, shape, view, squared)

    def finish(self) -> dict[str, Mask]:
        return self._masks


@dataclass(frozen=True)
class _Counted(Policy):
    k: int = 1

    def __post_init__(self) -> None:
        _check_count(f"{type(self).__name__}(k)", "k", self.k)


@dataclass(frozen=True, repr=False)
class PerNeuron(_Counted):
    """The ``k`` best entries of every neuron (row): GPS, section 3.2 and Eq. 5.

    Args:
        k: entries a neuron; a neuron with fewer inputs is kept whole.
        columns: inputs a matrix that its neurons choose from. With fewer inputs in use, training saves fewer
            activations and multiplies less. They are found greedily: each one adds the most to the sum of the scores
            that the neurons then keep, which reaches at least 63 % of the best possible sum (Nemhauser et al. 1978).
            None: all of them, as in GPS.
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

    def choose(self, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> Mask:
        if self.columns is None or self.columns >= score.shape[1]:
            return PerRow(gk.topk_rows(score, self.k), shape, view)
        columns = covering_columns(score, self.k, self.columns)
        inside = gk.topk_rows(score[:, columns].contiguous(), self.k)
        return PerRow(columns[inside.long()].to(torch.int32), shape, view)


@dataclass(frozen=True)
class Rows(_Counted):
    """The ``k`` best neurons of every matrix, with all their inputs: GRFT, equations 4 to 6.

    A neuron's score is the sum of its squared scores (of the scores, where they are squares: ``"fisher"``).

    Args:
        k: neurons a matrix; a matrix with fewer is kept whole.
    """

    def entries(self, rows: int, cols: int) -> int:
        return min(self.k, rows) * cols

    def choose(self, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> Mask:
        return WholeRows(_best(score, 1, self.k, squared), shape, view)


@dataclass(frozen=True)
class Columns(_Counted):
    """The ``k`` best inputs of every matrix, for all neurons: GRFT with columns.

    An input's score is the sum of its squared scores (of the scores, where they are squares: ``"fisher"``).

    Args:
        k: inputs a matrix; a matrix with fewer is kept whole.
    """

    def entries(self, rows: int, cols: int) -> int:
        return min(self.k, cols) * rows

    def choose(self, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> Mask:
        return WholeColumns(_best(score, 0, self.k, squared), shape, view)


@dataclass(frozen=True)
class _Shared(Policy):
    """A number of entries, absolute or as a share of those there are."""

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
    """The best entries of every parameter, whatever their neurons: "layer" in GPS, Tab. 6a.

    Args:
        fraction: share of the entries of each parameter, rounded to the nearest number.
        count: entries of each parameter; one with fewer is kept whole.
    """

    def choose(self, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> Mask:
        return _mask_of(largest(score.reshape(-1), self._of(score.numel())), shape, view)


@dataclass(frozen=True, repr=False)
class Global(_Shared):
    """The best entries of all parameters together: "net" in GPS, Tab. 6a.

    While a selection runs, 20 bytes are held for every entry that may still be among the best.

    Args:
        fraction: share of the entries of all ranked parameters, rounded to the nearest number.
        count: entries in all.
    """

    def budget(self, sizes: Iterable[tuple[int, int]]) -> int:
        return self._of(sum(rows * cols for rows, cols in sizes))

    def start(self, sizes: Sizes) -> Ranking:
        return _Together(self.budget(sizes.values()), list(sizes))

    def choose(self, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> Mask:
        ranking = self.start({"": (score.shape[0], score.shape[1])})
        ranking.add("", score, shape, view, squared)
        return ranking.finish()[""]


class _Together:
    """The largest scores of all parameters, of which no more than ``count`` candidates are held at a time."""

    def __init__(self, count: int, names: list[str]) -> None:
        self._count = count
        self._number = {name: number for number, name in enumerate(names)}
        self._added: dict[str, tuple[torch.device, tuple[int, ...], NeuronView]] = {}
        self._held: tuple[Tensor, Tensor, Tensor] | None = None  # magnitudes, numbers of parameters, entries

    def add(self, name: str, score: Tensor, shape: tuple[int, ...], view: NeuronView, squared: bool) -> None:
        self._added[name] = (score.device, shape, view)
        magnitudes = score.reshape(-1).abs()
        if self._held is not None and 0 < self._count == self._held[0].numel():
            bound = self._held[0].min().to(magnitudes.device)
            entries = (magnitudes >= bound).nonzero().view(-1)
            entries = entries[largest(magnitudes[entries], self._count)]
        else:
            entries = largest(magnitudes, self._count)
        new = (magnitudes[entries], torch.full_like(entries, self._number[name]), entries)
        if self._held is not None:
            values, numbers, places = (
                torch.cat([held, one.to(held.device)]) for held, one in zip(self._held, new, strict=True)
            )
            order = places.argsort(stable=True)
            order = order[numbers[order].argsort(stable=True)]  # ties go to the first parameter, then the first entry
            order = order[largest(values[order], self._count)]
            new = (values[order], numbers[order], places[order])
        self._held = new

    def finish(self) -> dict[str, Mask]:
        masks: dict[str, Mask] = {}
        for name, (device, shape, view) in self._added.items():
            assert self._held is not None
            _, numbers, entries = self._held
            chosen = entries[numbers == self._number[name]].sort().values.to(device)
            masks[name] = _mask_of(chosen, shape, view)
        return masks


def equal_budget(policy: type[Policy], like: Policy, sizes: Iterable[tuple[int, int]]) -> Policy:
    """The policy of another kind that trains as many entries as ``like``, or as near to it as its steps allow.

    GPS compares levels and GRFT rows with columns at equal budgets (GPS, Tab. 6a).

    Args:
        policy: the kind: :class:`PerNeuron`, :class:`Rows`, :class:`Columns`, :class:`PerLayer` or :class:`Global`.
        like: the policy whose budget it gets.
        sizes: of the neuron views: ``ranked_sizes(model).values()``.
    """
    sizes = list(sizes)
    wanted = like.budget(sizes)
    if issubclass(policy, _Shared):
        total = sum(rows * cols for rows, cols in sizes)
        return policy(count=wanted) if policy is Global else policy(fraction=wanted / max(total, 1))
    if not issubclass(policy, _Counted):
        raise TypeError(f"policy must be one of this module's classes, got {policy!r}")
    low, high = 1, max((max(size) for size in sizes), default=1)
    while low < high:  # the smallest k that takes at least as many
        middle = (low + high) // 2
        if policy(middle).budget(sizes) < wanted:
            low = middle + 1
        else:
            high = middle
    below = policy(max(low - 1, 1))
    return below if wanted - below.budget(sizes) <= policy(low).budget(sizes) - wanted else policy(low)


def largest(values: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest magnitudes of a vector without NaN: int64, ascending, ties to the lowest."""
    if count >= values.numel():
        return torch.arange(values.numel(), device=values.device)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    magnitudes = values.abs()
    group = min(magnitudes.numel() // (2 * count), 64)
    if group < 4:
        return _largest_of(magnitudes, count)
    # As many entries as there are peaks above it reach the bound, so the entries wanted are among those that do.
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
    """The columns, found greedily, inside which the ``k`` largest magnitudes of every row have the largest sum.

    The sum of the ``k`` best of every row is submodular in the set of columns, so a column never adds more later than
    it would have added before: only those whose old gain still leads are looked at again (Minoux 1978).

    Args:
        score: finite [rows, cols].
        k: entries a row.
        count: number of columns.

    Returns:
        int64 [count], ascending.
    """
    columns = score.abs().t().contiguous()  # [cols, rows]: one column is read at a time
    columns = columns.to(trained_dtype(columns))
    kept = columns.new_zeros(k, columns.shape[1])  # the best of every row among the chosen columns, ascending
    gains = columns.sum(1, dtype=torch.float64).cpu().numpy()
    seen_with = numpy.zeros(len(columns), dtype=int)  # how many columns had been chosen when a gain was worked out
    chosen: list[int] = []
    while len(chosen) < min(count, len(columns)):
        best = int(gains.argmax())  # the first, of equal ones
        if seen_with[best] == len(chosen):
            kept = torch.cat([kept, columns[best : best + 1]]).sort(0).values[1:]
            gains[best] = -1.0
            chosen.append(best)
        else:
            leading = numpy.argpartition(-gains, min(_LOOK_AT, len(gains)) - 1)[:_LOOK_AT]
            leading = numpy.union1d(leading, [best])  # which is not the one that argpartition takes among equal ones
            stale = leading[(seen_with[leading] != len(chosen)) & (gains[leading] >= 0)]
            added = columns[torch.from_numpy(stale).to(columns.device)].sub_(kept[0]).clamp_(min=0)
            gains[stale] = added.sum(1, dtype=torch.float64).cpu().numpy()
            seen_with[stale] = len(chosen)
    return torch.tensor(sorted(chosen), dtype=torch.int64, device=score.device)


def _mask_of(entries: Tensor, shape: tuple[int, ...], view: NeuronView) -> Mask:
    """The mask of entries of a neuron view, by their row-major places in it."""
    if entries.numel() == 0:
        return Frozen(shape, "nothing selected")
    if entries.numel() == math.prod(shape):
        return Whole(shape)
    if view.is_leading:
        return Flat(entries, shape)
    dense = torch.zeros(view.shape(shape), dtype=torch.bool, device=entries.device)
    dense.view(-1)[entries] = True
    return Flat.from_dense(view.undo(dense, shape))


def _best(score: Tensor, dim: int, k: int, squared: bool) -> Tensor:
    """The rows or columns with the largest sum of squares along ``dim``: int32 [k], ascending, ties to the lowest."""
    score = score.to(trained_dtype(score))  # half precision would round the sums, or overflow
    return gk.topk_rows((score if squared else score.square()).sum(dim).unsqueeze(0), k)[0]


def _check_count(what: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} needs an integer {name} >= 1, got {value!r}")
