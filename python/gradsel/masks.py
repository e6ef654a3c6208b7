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
from gradsel.views import NeuronView, memory_offsets


class Operands(NamedTuple):
    """What ``gradsel_kernels.masked_adam_`` wants to know of one parameter."""

    weight: Tensor
    grad: Tensor
    indices: Tensor | None
    layout: gk.Layout


class Mask(ABC):
    """The selected entries of a parameter, in a fixed order, the mask order.

    Attributes:
        kind: the name of the kind, as files and tables show it.
        shape: shape of the parameter.
        compact_shape: shape of a tensor of the selected entries: gradients, moments, values.
    """

    kind: ClassVar[str]
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
    def operands(self, weight: Tensor, grad: Tensor) -> Operands:
        """Weight, gradient and indices in the form that the kernels take, as aliases wherever strides allow it."""

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


class PerRow(Mask):
    """K entries in every row of a neuron view: GPS.

    Args:
        cols: int32 [rows, K], ascending in each row.
        shape: shape of the parameter.
        view: how the parameter is seen as rows and columns.

    Raises:
        TypeError, ValueError: ``cols`` is not int32, does not fit the view, or is not strictly ascending in range.
    """

    kind = "per-row"

    def __init__(self, cols: Tensor, shape: Sequence[int], view: NeuronView | None = None) -> None:
        self.shape = tuple(shape)
        self.view = view or NeuronView()
        self.view.check(self.shape)
        rows, n = self.view.shape(self.shape)
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

    def gather(self, weight: Tensor) -> Tensor:
        return gk.gather_rows(self.view.of(weight), self.cols)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        matrix = self.view.alias(weight)
        if matrix is not None:
            gk.scatter_rows_(matrix, self.cols, values)
        else:
            _memory(weight).view(-1)[self._offsets(weight).long()] = values.reshape(-1).to(weight.dtype)

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.view.shape(self.shape), dtype=torch.bool, device=self.cols.device)
        return self.view.undo(dense.scatter_(1, self.cols.long(), True), self.shape)

    def used_columns(self) -> Tensor:
        return self.cols.unique().long()

    def operands(self, weight: Tensor, grad: Tensor) -> Operands:
        if self.view.is_first_dim and weight.is_contiguous() and grad.is_contiguous():
            # No view is needed, which saves its cost on every step: rows lie one after the other in memory.
            return Operands(weight, grad, self.cols, gk.Layout.COLS)
        matrix = self.view.alias(weight)
        if matrix is not None:
            return Operands(matrix, self.view.of(grad), self.cols, gk.Layout.COLS)
        return Operands(_memory(weight), self.gather(grad), self._offsets(weight), gk.Layout.FLAT)

    def _pick(self, entries: Tensor) -> Tensor:
        return self.view.of(entries).gather(1, self.cols.long()).view(-1)

    def to(self, device: torch.device) -> PerRow:
        return self if self.cols.device == device else PerRow(self.cols.to(device), self.shape, self.view)

    def tensors(self) -> dict[str, Tensor]:
        return {"cols": self.cols}

    def describe(self) -> dict[str, Any]:
        return {"row_dims": list(self.view.row_dims), "groups": self.view.groups}


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

    def operands(self, weight: Tensor, grad: Tensor) -> Operands:
        if weight.ndim <= 2 or (weight.is_contiguous() and grad.is_contiguous()):
            return Operands(weight, grad, self.indices, gk.Layout.FLAT)
        return Operands(_memory(weight), self.gather(grad), self._offsets(weight), gk.Layout.FLAT)

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

    def operands(self, weight: Tensor, grad: Tensor) -> Operands:
        if weight.ndim <= 2 or (weight.is_contiguous() and grad.is_contiguous()):
            return Operands(weight, grad, None, gk.Layout.ALL)
        return Operands(_memory(weight), self.gather(grad), self._offsets(weight), gk.Layout.FLAT)

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

    def operands(self, weight: Tensor, grad: Tensor) -> Operands:
        return Operands(weight.new_empty(0), grad.new_empty(0), None, gk.Layout.ALL)

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
    if kind == Flat.kind:
        return Flat(tensors["indices"], shape)
    if kind == Whole.kind:
        return Whole(shape)
    if kind == Frozen.kind:
        return Frozen(shape, str(description["reason"]))
    raise ValueError(f"unknown kind of mask {kind!r}")


def _columns(shape: tuple[int, ...]) -> int:
    """Columns of a parameter flattened behind its first dimension."""
    return math.prod(shape[1:])


def _memory(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as one row; no compact gradient has this shape, so none is taken for a dense one."""
    return tensor.as_strided((1, 1, tensor.numel()), (tensor.numel(), tensor.numel(), 1))
