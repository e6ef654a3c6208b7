"""Masks: which entries of one parameter are trained. One small object a parameter, the same verbs for every kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.products import COPIED_SHARE, Lookup, Product
from gradsel.views import NeuronView, memory_offsets


class Place(NamedTuple):
    """Where the selected entries lie in a parameter, in the form that ``gradsel_kernels.masked_adam_`` takes."""

    weight: Tensor
    indices: Tensor | None
    layout: gk.Layout


class Operands(NamedTuple):
    """A :class:`Place`, and a gradient that is dense or in mask order."""

    weight: Tensor
    grad: Tensor
    indices: Tensor | None
    layout: gk.Layout


class Mask(ABC):
    """The selected entries of a parameter, in a fixed order, the mask order.

    Attributes:
        kind: the name of the kind, as files and tables show it.
        is_whole: every entry is selected, and no more needs to be known.
        shape: shape of the parameter.
        compact_shape: shape of a tensor of the selected entries: gradients, moments, values.
    """

    kind: ClassVar[str]
    is_whole: ClassVar[bool] = False
    shape: tuple[int, ...]
    compact_shape: tuple[int, ...]
    _scattered: tuple[tuple[int, ...], Tensor] | None = None

    @cached_property
    def nnz(self) -> int:
        """Number of selected entries."""
        return math.prod(self.compact_shape)

    @abstractmethod
    def gather(self, weight: Tensor) -> Tensor:
        """The selected entries of ``weight``, a new tensor of ``compact_shape``."""

    @abstractmethod
    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Writes ``values`` (of ``compact_shape``) to the selected entries of ``weight``, rounded to its dtype."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """bool, shaped like the parameter."""

    @abstractmethod
    def place(self, weight: Tensor) -> Place:
        """Weight and indices for a gradient in mask order, as aliases."""

    def operands(self, weight: Tensor, grad: Tensor) -> Operands:
        """Weight, dense gradient and indices in the form that the kernels take, aliases wherever strides allow it."""
        place = self.place(weight)
        if place.weight is not weight or not (weight.ndim <= 2 or grad.is_contiguous()):
            grad = self.gather(grad)
        return Operands(place.weight, grad, place.indices, place.layout)

    @abstractmethod
    def to(self, device: torch.device) -> Mask:
        """The mask on ``device``: itself, if it is there already."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file stores of it beside :meth:`describe`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything but tensors, as JSON; :func:`from_parts` reads it."""

    @abstractmethod
    def used_columns(self) -> Tensor:
        """The columns of the neuron view with a selected entry, ascending: the inputs that backward needs. int64."""

    def product(self, view: NeuronView, groups: int = 1, share: float = COPIED_SHARE) -> Product:
        """How a layer that multiplies by the parameter computes the gradient of the selected entries.

        Args:
            view: the layer's rows and columns.
            groups: of a grouped convolution: its rows are cut into as many blocks, each with inputs of its own.
            share: see :data:`gradsel.products.COPIED_SHARE`.
        """
        rows, n = view.shape(self.shape)
        row, col = self._coordinates(view)
        return Product.irregular(row, col + row // (rows // groups) * n, rows, groups * n, share)

    def lookup(self) -> Lookup:
        """How an embedding [tokens, dim] computes the gradient of the selected entries."""
        row, col = self._coordinates(NeuronView())
        rows, slots = row.unique(return_inverse=True)
        return Lookup(self.compact_shape, self.shape[0], rows=rows, entries=torch.stack([slots, col]))

    def _coordinates(self, view: NeuronView) -> tuple[Tensor, Tensor]:
        """Row and column of every selected entry, int64 [nnz] in mask order."""
        numbers = torch.arange(math.prod(self.shape), device=self.device)
        places = torch.empty_like(numbers).scatter_(0, view.of(numbers.view(self.shape)).reshape(-1), numbers)
        entries = places[self._pick(numbers.view(self.shape))]
        columns = view.shape(self.shape)[1]
        return entries // columns, entries % columns

    @property
    def device(self) -> torch.device:
        """Where the indices are."""
        return torch.device("cpu")

    def _pick(self, entries: Tensor) -> Tensor:
        """The selected ones of a tensor shaped like the parameter, in mask order, flat."""
        return entries.reshape(-1)

    def _offsets(self, weight: Tensor) -> Tensor:
        """The selected entries as places in the memory of ``weight``, worked out once for its strides."""
        if self._scattered is None or self._scattered[0] != weight.stride():
            offsets = self._pick(memory_offsets(weight))
            if weight.numel() <= 2**31:
                offsets = offsets.to(torch.int32)
            self._scattered = (weight.stride(), offsets)
        return self._scattered[1]

    def to_bits(self) -> Tensor:
        """The packed bitmask, int32 [rows, words], of the parameter flattened behind its first dimension."""
        dense = self.to_dense()
        return gk.pack_bits(
            dense.reshape(dense.shape[0] if dense.ndim else 1, -1) if dense.numel() else dense.view(0, 0)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, nnz={self.nnz})"


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
        return Place(_memory(weight), self._offsets(weight), gk.Layout.FLAT)

    def operands(self, weight: Tensor, grad: Tensor) -> Operands:
        place = self.place(weight)
        if place.weight is not weight and place.layout is self.layout and place.weight.ndim == 2:
            return Operands(place.weight, self.view.of(grad), place.indices, place.layout)
        return super().operands(weight, grad)

    def _scatter_to_memory_(self, weight: Tensor, values: Tensor) -> None:
        _memory(weight).view(-1)[self._offsets(weight).long()] = values.reshape(-1).to(weight.dtype)

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
        return Product.per_row(cols.expand(rows, -1), groups * n, self.compact_shape, share)

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


class Flat(Mask):
    """Any entries, by their row-major index in the parameter: layer-wide selections, imported masks.

    Args:
        indices: int32 or int64 [nnz], ascending.
        shape: shape of the parameter.
    """

    kind = "irregular"

    def __init__(self, indices: Tensor, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        numel = math.prod(self.shape)
        if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
            raise TypeError(f"indices must be int32 or int64 [nnz], got {indices.dtype} {list(indices.shape)}")
        if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= numel or bool((indices.diff() <= 0).any())):
            raise ValueError(f"indices must ascend within 0 to {numel - 1}, the entries of a {list(self.shape)}")
        self.indices = indices.contiguous() if numel > 2**31 else indices.to(torch.int32)
        self.compact_shape = (indices.numel(),)

    @staticmethod
    def from_dense(mask: Tensor) -> Flat:
        """From a boolean mask shaped like the parameter."""
        if mask.dtype is not torch.bool:
            raise TypeError(f"a dense mask must be bool, got {mask.dtype}")
        return Flat(mask.reshape(-1).nonzero().view(-1), mask.shape)

    def gather(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1)[self.indices.long()]

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        weight[torch.unravel_index(self.indices.long(), self.shape)] = values.to(weight.dtype)

    def to_dense(self) -> Tensor:
        dense = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.indices.device)
        return dense.index_fill_(0, self.indices.long(), True).view(self.shape)

    def used_columns(self) -> Tensor:
        return (self.indices.long() % max(_columns(self.shape), 1)).unique()

    def place(self, weight: Tensor) -> Place:
        if weight.ndim <= 2 or weight.is_contiguous():
            return Place(weight, self.indices, gk.Layout.FLAT)
        return Place(_memory(weight), self._offsets(weight), gk.Layout.FLAT)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def _pick(self, entries: Tensor) -> Tensor:
        return entries.reshape(-1)[self.indices.long()]

    def to(self, device: torch.device) -> Flat:
        return self if self.indices.device == device else Flat(self.indices.to(device), self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"indices": self.indices}

    def describe(self) -> dict[str, Any]:
        return {}


class Whole(Mask):
    """Every entry: biases, heads."""

    kind = "whole"
    is_whole = True

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = self.compact_shape = tuple(shape)

    def gather(self, weight: Tensor) -> Tensor:
        return weight.clone(memory_format=torch.contiguous_format)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        weight.copy_(values.view(self.shape))

    def to_dense(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.bool)

    def used_columns(self) -> Tensor:
        return torch.arange(_columns(self.shape))

    def place(self, weight: Tensor) -> Place:
        if weight.ndim <= 2 or weight.is_contiguous():
            return Place(weight, None, gk.Layout.ALL)
        return Place(_memory(weight), self._offsets(weight), gk.Layout.FLAT)

    def to(self, device: torch.device) -> Whole:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {}


class Frozen(Mask):
    """No entry.

    Args:
        shape: shape of the parameter.
        reason: why it is not trained, in a few words.
    """

    kind = "frozen"
    compact_shape = (0,)

    def __init__(self, shape: Sequence[int], reason: str) -> None:
        self.shape = tuple(shape)
        self.reason = reason

    def gather(self, weight: Tensor) -> Tensor:
        return weight.new_empty(0)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        return None

    def to_dense(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.bool)

    def used_columns(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def place(self, weight: Tensor) -> Place:
        return Place(weight.new_empty(0), None, gk.Layout.ALL)

    def to(self, device: torch.device) -> Frozen:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {"reason": self.reason}


def from_parts(kind: str, shape: Sequence[int], description: dict[str, Any], tensors: dict[str, Tensor]) -> Mask:
    """The inverse of :meth:`Mask.describe` and :meth:`Mask.tensors`.

    Raises:
        TypeError, ValueError, KeyError: parts that make no mask, such as those of a damaged file.
    """
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"a shape is a list of sizes, got {shape!r}")
    if kind == PerRow.kind:
        view = NeuronView(tuple(description["row_dims"]), description["groups"])
        return PerRow(tensors["cols"], shape, view)
    if kind in (WholeRows.kind, WholeColumns.kind):
        view = NeuronView(tuple(description["row_dims"]), description["groups"])
        if kind == WholeRows.kind:
            return WholeRows(tensors["rows"], shape, view)
        return WholeColumns(tensors["cols"], shape, view)
    if kind == Flat.kind:
        return Flat(tensors["indices"], shape)
    if kind == Whole.kind:
        return Whole(shape)
    if kind == Frozen.kind:
        return Frozen(shape, str(description["reason"]))
    raise ValueError(f"unknown kind of mask {kind!r}")


def _check_ascending(name: str, numbers: Tensor, end: int) -> None:
    if numbers.dtype is not torch.int32 or numbers.ndim != 1:
        raise TypeError(f"{name} must be int32 [k], got {numbers.dtype} {list(numbers.shape)}")
    if numbers.numel() and (int(numbers[0]) < 0 or int(numbers[-1]) >= end or bool((numbers.diff() <= 0).any())):
        raise ValueError(f"{name} must ascend within 0 to {end - 1}, got {numbers.tolist()}")


def _first_inputs(rows: int, n: int, groups: int, device: torch.device) -> Tensor:
    """int32 [rows, 1]: where the inputs of each row's group begin."""
    return (torch.arange(rows, dtype=torch.int32, device=device) // max(rows // groups, 1) * n).unsqueeze(1)


def _columns(shape: tuple[int, ...]) -> int:
    """Columns of a parameter flattened behind its first dimension."""
    return math.prod(shape[1:])


def _memory(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as one row; no compact gradient has this shape, so none is taken for a dense one."""
    return tensor.as_strided((1, 1, tensor.numel()), (tensor.numel(), tensor.numel(), 1))
