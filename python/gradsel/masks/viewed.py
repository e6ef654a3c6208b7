"""Masks by rows and columns of a neuron view: some entries of every row, whole rows, whole columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

import gradsel_kernels as gk
from gradsel.masks.base import Mask, Place, memory_row
from gradsel.masks.encoding import ascends, cols_of, fewest_bytes, narrow, part_of, widen
from gradsel.masks.weight_grad import COPIED_SHARE, Lookup, Product
from gradsel.views import NeuronView


class Viewed(Mask):
    """Entries given by rows and columns of a neuron view.

    Attributes:
        view: how the parameter is seen as rows and columns.
        rows_and_columns: the shape of the neuron view.
        layout: how :attr:`indices` number the entries of that matrix.
    """

    layout: ClassVar[gk.Layout]

    def __init__(self, shape: Sequence[int], view: NeuronView | None) -> None:
        self.shape = tuple(shape)
        self.view = view or NeuronView()
        self.view.check(self.shape)
        self.rows_and_columns = self.view.shape(self.shape)

    @property
    def label(self) -> str:
        """The kind, and which dimensions number the rows if it is not the first one."""
        if not self.nnz or self.view.is_first_dim:
            return super().label
        dims = ", ".join(map(str, self.view.row_dims))
        groups = f" in {self.view.groups} groups" if self.view.groups > 1 else ""
        return f"{self.kind} (rows: dim {dims}{groups})"

    @property
    @abstractmethod
    def indices(self) -> Tensor:
        """The indices that ``gradsel_kernels.masked_adam_`` takes for :attr:`layout`."""

    def _matrix(self, weight: Tensor) -> Tensor | None:
        """The neuron view as an alias, or the weight itself if the kernels see it the same way, which is cheaper."""
        if self.view.is_first_dim and (weight.ndim == 2 or weight.is_contiguous()):
            return weight
        return self.view.alias(weight)

    def place(self, weight: Tensor) -> Place:
        matrix = self._matrix(weight)
        if matrix is not None:
            return Place(matrix, self.indices, self.layout)
        return Place(memory_row(weight), self._offsets(weight), gk.Layout.FLAT)

    def grad_at(self, place: Place, weight: Tensor, grad: Tensor) -> Tensor:
        if place.weight is not weight and place.weight.ndim == 2:
            return self.view.of(grad)
        return super().grad_at(place, weight, grad)

    def _scatter_to_memory_(self, weight: Tensor, values: Tensor) -> None:
        memory_row(weight).view(-1)[self._offsets(weight).long()] = values.reshape(-1).to(weight.dtype)

    @abstractmethod
    def numbers(self) -> Tensor:
        """Row-major indices of the selected entries in the neuron view: int64 [nnz], ascending."""

    def entries(self) -> Tensor:
        return self.numbers() if self.view.is_leading else super().entries()

    def ordered_entries(self) -> Tensor:
        return self.view.places(self.numbers(), self.shape)

    def offsets(self, weight: Tensor) -> Tensor:
        return self.numbers() if self.view.is_leading and weight.is_contiguous() else super().offsets(weight)

    def describe(self) -> dict[str, Any]:
        return {"row_dims": list(self.view.row_dims), "groups": self.view.groups}


class Lines(Viewed):
    """Whole rows or whole columns of a neuron view.

    Args:
        lines: int32 [k], their numbers, ascending.
        shape: shape of the parameter.
        view: how the parameter is seen as rows and columns.

    Attributes:
        dim: the dimension of the neuron view that lines number: 0 for rows, 1 for columns.
        part: the name of ``lines`` in files and messages.

    Raises:
        TypeError, ValueError: ``lines`` is not int32, or not strictly ascending in range.
    """

    dim: ClassVar[int]
    part: ClassVar[str]

    def __init__(self, lines: Tensor, shape: Sequence[int], view: NeuronView | None = None) -> None:
        super().__init__(shape, view)
        sizes = list(self.rows_and_columns)
        end = sizes[self.dim]
        if lines.dtype is not torch.int32 or lines.ndim != 1:
            raise TypeError(f"{self.part} must be int32 [k], got {lines.dtype} {list(lines.shape)}")
        if lines.numel() and (int(lines[0]) < 0 or int(lines[-1]) >= end or not ascends(lines)):
            raise ValueError(f"{self.part} must ascend within 0 to {end - 1}, got {_shortened(lines)}")
        sizes[self.dim] = lines.numel()
        self.lines = lines
        self.compact_shape = tuple(sizes)

    @property
    def device(self) -> torch.device:
        return self.lines.device

    def _index(self) -> tuple[slice | Tensor, ...]:
        """Indexes the lines of a matrix."""
        return (*[slice(None)] * self.dim, self.lines.long())

    def gather(self, weight: Tensor) -> Tensor:
        return self.view.of(weight)[self._index()].contiguous()

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        matrix = self.view.alias(weight)
        if matrix is not None:
            matrix[self._index()] = values.to(weight.dtype)
        else:
            self._scatter_to_memory_(weight, values)

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.rows_and_columns, dtype=torch.bool, device=self.device)
        dense[self._index()] = True
        return self.view.undo(dense, self.shape)

    def lookup(self) -> Lookup:
        if not self.view.is_first_dim:
            return super().lookup()
        lines = self.lines.long()
        return Lookup(self.compact_shape, self.shape[0], *((lines, None) if self.dim == 0 else (None, lines)))

    def _pick(self, entries: Tensor) -> Tensor:
        return self.gather(entries).view(-1)

    def to(self, device: torch.device) -> Self:
        return self if self.device == device else type(self)(self.lines.to(device), self.shape, self.view)

    def tensors(self) -> dict[str, Tensor]:
        return {self.part: self.lines}

    def packed(self) -> dict[str, Tensor]:
        return {self.part: narrow(self.lines, self.rows_and_columns[self.dim])}

    @classmethod
    def from_parts(cls, shape: tuple[int, ...], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        part, tensor = part_of(tensors, cls.part)
        return cls(widen(part, tensor, (torch.uint16, torch.int32)), shape, _view_of(description))


class PerRow(Viewed):
    """K entries in every row of a neuron view: GPS.

    Args:
        cols: int32 [rows, K], ascending in each row.
        shape: shape of the parameter.
        view: how the parameter is seen as rows and columns.

    Raises:
        TypeError, ValueError: ``cols`` is not int32, does not fit the view, or is not strictly ascending in range.
    """

    kind = "per-row"
    layout = gk.Layout.COLS

    def __init__(self, cols: Tensor, shape: Sequence[int], view: NeuronView | None = None) -> None:
        super().__init__(shape, view)
        rows, n = self.rows_and_columns
        if cols.dtype is not torch.int32:
            raise TypeError(f"cols must be int32, got {cols.dtype}")
        if cols.ndim != 2 or cols.shape[0] != rows or cols.shape[1] > n:
            raise ValueError(
                f"cols must be [{rows}, at most {n}] for a parameter {list(shape)}, got {list(cols.shape)}"
            )
        if cols.numel() and (int(cols.min()) < 0 or int(cols.max()) >= n):
            raise ValueError(f"cols must lie in 0 to {n - 1}, found {int(cols.min())} to {int(cols.max())}")
        if not ascends(cols):
            row = int((cols.diff(dim=1) <= 0).any(dim=1).nonzero()[0])
            raise ValueError(f"cols must ascend in every row, but row {row} does not: {_shortened(cols[row])}")
        self.cols = cols.contiguous()
        self.compact_shape = tuple(cols.shape)

    @property
    def indices(self) -> Tensor:
        return self.cols

    @property
    def device(self) -> torch.device:
        return self.cols.device

    def gather(self, weight: Tensor) -> Tensor:
        return gk.gather_rows(self.view.of(weight), self.cols)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        matrix = self.view.alias(weight)
        if matrix is not None:
            gk.scatter_rows_(matrix, self.cols, values)
        else:
            self._scatter_to_memory_(weight, values)

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.rows_and_columns, dtype=torch.bool, device=self.cols.device)
        return self.view.undo(dense.scatter_(1, self.cols.long(), True), self.shape)

    def used_columns(self) -> Tensor:
        return self.cols.unique().long()

    def product(self, view: NeuronView, groups: int = 1, share: float = COPIED_SHARE) -> Product:
        if view != self.view:
            return super().product(view, groups, share)
        rows, n = self.rows_and_columns
        if groups == 1:
            return Product.of_columns(self.cols, n, share)
        return Product.per_row(
            self.cols + _first_inputs(rows, n, groups, self.device), groups * n, self.compact_shape, share
        )

    def lookup(self) -> Lookup:
        if not self.view.is_first_dim:
            return super().lookup()
        return Lookup(self.compact_shape, self.shape[0], cols=self.cols.long())

    def _pick(self, entries: Tensor) -> Tensor:
        return self.view.of(entries).gather(1, self.cols.long()).view(-1)

    def to(self, device: torch.device) -> PerRow:
        return self if self.cols.device == device else PerRow(self.cols.to(device), self.shape, self.view)

    def tensors(self) -> dict[str, Tensor]:
        return {"cols": self.cols}

    def packed(self) -> dict[str, Tensor]:
        cols = narrow(self.cols, self.rows_and_columns[1])
        return fewest_bytes("cols", cols, self.rows_and_columns, lambda: self.view.of(self.to_dense()))

    @classmethod
    def from_parts(cls, shape: tuple[int, ...], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        view = _view_of(description)
        view.check(shape)
        part, tensor = part_of(tensors, "cols", "bits")
        if part == "bits":
            return cls(cols_of(tensor, view.shape(shape)), shape, view)
        return cls(widen(part, tensor, (torch.uint16, torch.int32)), shape, view)

    def numbers(self) -> Tensor:
        return _numbers(self.cols, *self.rows_and_columns)


class WholeRows(Lines):
    """All entries of some neurons: GRFT with rows, single tokens of an embedding. See :class:`Lines`."""

    kind = "rows"
    dim = 0
    part = "rows"
    layout = gk.Layout.FLAT

    @property
    def rows(self) -> Tensor:
        """int32 [k], ascending."""
        return self.lines

    @cached_property
    def indices(self) -> Tensor:
        numbers = self.numbers()
        return numbers if self.numel > 2**31 else numbers.to(torch.int32)

    def numbers(self) -> Tensor:
        n = self.rows_and_columns[1]
        return (self.rows.long().unsqueeze(1) * n + torch.arange(n, device=self.device)).view(-1)

    def used_columns(self) -> Tensor:
        return torch.arange(self.rows_and_columns[1] if self.rows.numel() else 0, device=self.device)

    def product(self, view: NeuronView, groups: int = 1, share: float = COPIED_SHARE) -> Product:
        if view != self.view:
            return super().product(view, groups, share)
        rows, n = self.rows_and_columns
        if groups == 1:
            return Product.whole_rows(self.rows, n)
        cols = torch.arange(n, dtype=torch.int32, device=self.device) + _first_inputs(rows, n, groups, self.device)
        rows64 = self.rows.long()
        return Product.per_row(cols[rows64], groups * n, self.compact_shape, share, rows64)


class WholeColumns(Lines):
    """The same inputs of every neuron: GRFT with columns. See :class:`Lines`."""

    kind = "columns"
    dim = 1
    part = "cols"
    layout = gk.Layout.COLS

    @property
    def cols(self) -> Tensor:
        """int32 [k], ascending."""
        return self.lines

    @cached_property
    def indices(self) -> Tensor:
        return self.cols.expand(self.compact_shape).contiguous()

    def numbers(self) -> Tensor:
        return _numbers(self.cols, *self.rows_and_columns)

    def used_columns(self) -> Tensor:
        return self.cols.long()

    def product(self, view: NeuronView, groups: int = 1, share: float = COPIED_SHARE) -> Product:
        if view != self.view:
            return super().product(view, groups, share)
        rows, n = self.rows_and_columns
        cols = self.cols + _first_inputs(rows, n, groups, self.device)
        return Product.per_row(cols, groups * n, self.compact_shape, share)


def _numbers(cols: Tensor, rows: int, n: int) -> Tensor:
    """int64 [rows * k]: row-major indices in a matrix [rows, n] of its columns ``cols`` [rows, k] or [k]."""
    return (torch.arange(rows, device=cols.device).unsqueeze(1) * n + cols).view(-1)


def _view_of(description: Mapping[str, Any]) -> NeuronView:
    """The neuron view in a description that may be damaged."""
    row_dims, groups = description["row_dims"], description["groups"]
    if not isinstance(row_dims, list) or not all(type(number) is int for number in [*row_dims, groups]):
        raise ValueError(f"row_dims and groups are integers, got {row_dims!r} and {groups!r}")
    return NeuronView(tuple(row_dims), groups)


def _shortened(numbers: Tensor) -> str:
    """The first numbers of a vector that may be long, for messages."""
    return str(numbers[:16].tolist())[:-1] + (", ...]" if numbers.numel() > 16 else "]")


def _first_inputs(rows: int, n: int, groups: int, device: torch.device) -> Tensor:
    """int32 [rows, 1]: the first input of each row's group."""
    return (torch.arange(rows, dtype=torch.int32, device=device) // max(rows // groups, 1) * n).unsqueeze(1)
