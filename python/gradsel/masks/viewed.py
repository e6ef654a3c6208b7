"""Masks by rows and columns of a neuron view: some entries of every row, whole rows, whole columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.masks.base import Mask, Place, memory_of
from gradsel.products import COPIED_SHARE, Lookup, Product
from gradsel.views import NeuronView


class _Viewed(Mask):
    """Entries named by rows and columns of a neuron view.

    Attributes:
        view: how the parameter is seen as rows and columns.
        layout: how :attr:`indices` name entries of that matrix.
    """

    layout: ClassVar[gk.Layout]

    def __init__(self, shape: Sequence[int], view: NeuronView | None) -> None:
        self.shape = tuple(shape)
        self.view = view or NeuronView()
        self.view.check(self.shape)
        self.rows_and_columns = self.view.shape(self.shape)

    @property
    @abstractmethod
    def indices(self) -> Tensor:
        """For ``gradsel_kernels.masked_adam_``."""

    def _matrix(self, weight: Tensor) -> Tensor | None:
        """The neuron view as an alias; the weight itself where the kernels see it so, which is cheaper."""
        if self.view.is_first_dim and (weight.ndim == 2 or weight.is_contiguous()):
            return weight
        return self.view.alias(weight)

    def place(self, weight: Tensor) -> Place:
        matrix = self._matrix(weight)
        if matrix is not None:
            return Place(matrix, self.indices, self.layout)
        return Place(memory_of(weight), self._offsets(weight), gk.Layout.FLAT)

    def _grad_at(self, place: Place, weight: Tensor, grad: Tensor) -> Tensor:
        if place.weight is not weight and place.weight.ndim == 2:
            return self.view.of(grad)
        return super()._grad_at(place, weight, grad)

    def _scatter_to_memory_(self, weight: Tensor, values: Tensor) -> None:
        memory_of(weight).view(-1)[self._offsets(weight).long()] = values.reshape(-1).to(weight.dtype)

    def describe(self) -> dict[str, Any]:
        return {"row_dims": list(self.view.row_dims), "groups": self.view.groups}


class PerRow(_Viewed):
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
        if bool((cols.diff(dim=1) <= 0).any()):
            row = int((cols.diff(dim=1) <= 0).any(dim=1).nonzero()[0])
            raise ValueError(f"cols must ascend in every row, row {row} does not: {cols[row].tolist()}")
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


class WholeRows(_Viewed):
    """All entries of some neurons: GRFT with rows, single tokens of an embedding.

    Args:
        rows: int32 [k], ascending.
        shape: shape of the parameter.
        view: how the parameter is seen as rows and columns.

    Raises:
        TypeError, ValueError: ``rows`` is not int32, or not strictly ascending in range.
    """

    kind = "rows"
    layout = gk.Layout.FLAT

    def __init__(self, rows: Tensor, shape: Sequence[int], view: NeuronView | None = None) -> None:
        super().__init__(shape, view)
        _check_ascending("rows", rows, self.rows_and_columns[0])
        self.rows = rows
        self.compact_shape = (rows.numel(), self.rows_and_columns[1])

    @cached_property
    def indices(self) -> Tensor:
        rows, n = self.rows_and_columns
        flat = (self.rows.long().unsqueeze(1) * n + torch.arange(n, device=self.device)).view(-1)
        return flat if rows * n > 2**31 else flat.to(torch.int32)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def gather(self, weight: Tensor) -> Tensor:
        return self.view.of(weight)[self.rows.long()]

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        matrix = self.view.alias(weight)
        if matrix is not None:
            matrix[self.rows.long()] = values.to(weight.dtype)
        else:
            self._scatter_to_memory_(weight, values)

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.rows_and_columns, dtype=torch.bool, device=self.device)
        dense[self.rows.long()] = True
        return self.view.undo(dense, self.shape)

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

    def lookup(self) -> Lookup:
        if not self.view.is_first_dim:
            return super().lookup()
        return Lookup(self.compact_shape, self.shape[0], rows=self.rows.long())

    def _pick(self, entries: Tensor) -> Tensor:
        return self.gather(entries).reshape(-1)

    def to(self, device: torch.device) -> WholeRows:
        return self if self.device == device else WholeRows(self.rows.to(device), self.shape, self.view)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}


class WholeColumns(_Viewed):
    """The same inputs of every neuron: GRFT with columns.

    Args:
        cols: int32 [k], ascending.
        shape: shape of the parameter.
        view: how the parameter is seen as rows and columns.

    Raises:
        TypeError, ValueError: ``cols`` is not int32, or not strictly ascending in range.
    """

    kind = "columns"
    layout = gk.Layout.COLS

    def __init__(self, cols: Tensor, shape: Sequence[int], view: NeuronView | None = None) -> None:
        super().__init__(shape, view)
        _check_ascending("cols", cols, self.rows_and_columns[1])
        self.cols = cols
        self.compact_shape = (self.rows_and_columns[0], cols.numel())

    @cached_property
    def indices(self) -> Tensor:
        return self.cols.expand(self.compact_shape).contiguous()

    @property
    def device(self) -> torch.device:
        return self.cols.device

    def gather(self, weight: Tensor) -> Tensor:
        return self.view.of(weight)[:, self.cols.long()].contiguous()

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        matrix = self.view.alias(weight)
        if matrix is not None:
            matrix[:, self.cols.long()] = values.to(weight.dtype)
        else:
            self._scatter_to_memory_(weight, values)

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.rows_and_columns, dtype=torch.bool, device=self.device)
        dense[:, self.cols.long()] = True
        return self.view.undo(dense, self.shape)

    def used_columns(self) -> Tensor:
        return self.cols.long()

    def product(self, view: NeuronView, groups: int = 1, share: float = COPIED_SHARE) -> Product:
        if view != self.view:
            return super().product(view, groups, share)
        rows, n = self.rows_and_columns
        cols = self.cols + _first_inputs(rows, n, groups, self.device)
        return Product.per_row(cols, groups * n, self.compact_shape, share)

    def lookup(self) -> Lookup:
        if not self.view.is_first_dim:
            return super().lookup()
        return Lookup(self.compact_shape, self.shape[0], cols=self.cols.long())

    def _pick(self, entries: Tensor) -> Tensor:
        return self.gather(entries).view(-1)

    def to(self, device: torch.device) -> WholeColumns:
        return self if self.device == device else WholeColumns(self.cols.to(device), self.shape, self.view)

    def tensors(self) -> dict[str, Tensor]:
        return {"cols": self.cols}


def _check_ascending(name: str, numbers: Tensor, end: int) -> None:
    if numbers.dtype is not torch.int32 or numbers.ndim != 1:
        raise TypeError(f"{name} must be int32 [k], got {numbers.dtype} {list(numbers.shape)}")
    if numbers.numel() and (int(numbers[0]) < 0 or int(numbers[-1]) >= end or bool((numbers.diff() <= 0).any())):
        raise ValueError(f"{name} must ascend within 0 to {end - 1}, got {numbers.tolist()}")


def _first_inputs(rows: int, n: int, groups: int, device: torch.device) -> Tensor:
    """int32 [rows, 1]: where the inputs of each row's group begin."""
    return (torch.arange(rows, dtype=torch.int32, device=device) // max(rows // groups, 1) * n).unsqueeze(1)
