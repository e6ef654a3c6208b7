"""What every kind of mask can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

import gradsel_kernels as gk
from gradsel.masks.weight_grad import COPIED_SHARE, Lookup, Product
from gradsel.views import NeuronView, memory_extent, memory_of, memory_offsets


class Place(NamedTuple):
    """Where the selected entries lie in a parameter, in the form that ``gradsel_kernels.masked_adam_`` takes."""

    weight: Tensor
    indices: Tensor | None
    layout: gk.Layout


class Mask(ABC):
    """The selected entries of a parameter, in a fixed order, the mask order.

    Attributes:
        kind: the name of the kind, as files and tables show it.
        is_whole: the kind selects every entry, and so stores no indices.
        shape: shape of the parameter.
        compact_shape: shape of a tensor with the selected entries: gradients, moments, values.
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

    @cached_property
    def numel(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """How the parameter is trained, or why it is not, in a few words for tables."""
        return self.kind if self.nnz else "nothing selected"

    @property
    def how(self) -> str:
        """Another name of :attr:`label`."""
        return self.label

    @abstractmethod
    def gather(self, weight: Tensor) -> Tensor:
        """The selected entries of ``weight``, a new tensor of ``compact_shape``."""

    @abstractmethod
    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Writes ``values`` (of ``compact_shape``) to the selected entries of ``weight``, rounded to its dtype."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """bool, shaped like the parameter."""

    def entries(self) -> Tensor:
        """Row-major indices of the selected entries in the parameter: int64 [nnz], ascending."""
        return self.ordered_entries().sort().values

    @abstractmethod
    def ordered_entries(self) -> Tensor:
        """Row-major indices of the selected entries in the parameter: int64 [nnz], in mask order.

        Takes memory for the selected entries only, whatever shape a file says the parameter has.
        """

    @abstractmethod
    def place(self, weight: Tensor) -> Place:
        """Weight and indices for a gradient in mask order, without copying either."""

    def grad_at(self, place: Place, weight: Tensor, grad: Tensor) -> Tensor:
        """A dense gradient in the form that fits a place: unchanged, or its selected entries."""
        if place.weight is weight and (weight.ndim <= 2 or grad.is_contiguous()):
            return grad
        return self.gather(grad)

    @abstractmethod
    def to(self, device: torch.device) -> Mask:
        """The mask on ``device``: the same object if it is there already."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors as they are in memory, by name: at most one."""

    def packed(self) -> dict[str, Tensor]:
        """The same in as few bytes as possible, for files: uint16 or int32 numbers, or packed bits."""
        return self.tensors()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""

    @classmethod
    @abstractmethod
    def from_parts(cls, shape: tuple[int, ...], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of :meth:`describe` and of :meth:`tensors` or :meth:`packed`.

        Args:
            shape: a shape that :func:`gradsel.masks.from_parts` has checked.
            description, tensors: untrusted.

        Raises:
            LookupError, TypeError, ValueError: they do not describe a mask of this kind.
        """

    @abstractmethod
    def used_columns(self) -> Tensor:
        """The columns of the neuron view with a selected entry, the inputs that backward needs: int64, ascending."""

    def product(self, view: NeuronView, groups: int = 1, share: float = COPIED_SHARE) -> Product:
        """How a layer that multiplies by the parameter computes the gradient of the selected entries.

        Args:
            view: the layer's rows and columns.
            groups: for a grouped convolution: the rows form this many blocks, each with its own inputs.
            share: see :data:`gradsel.masks.weight_grad.COPIED_SHARE`.
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
        """The device of the indices."""
        return torch.device("cpu")

    def _pick(self, entries: Tensor) -> Tensor:
        """The selected entries of a tensor shaped like the parameter, flat in mask order."""
        return entries.reshape(-1)

    def _offsets(self, weight: Tensor) -> Tensor:
        """Where the selected entries lie in the memory of ``weight``, computed once for its strides."""
        if self._scattered is None or self._scattered[0] != weight.stride():
            offsets = self._pick(memory_offsets(weight))
            if memory_extent(weight) <= 2**31:
                offsets = offsets.to(torch.int32)
            self._scattered = (weight.stride(), offsets)
        return self._scattered[1]

    def offsets(self, weight: Tensor) -> Tensor:
        """Where the selected entries lie in the memory of ``weight``: int64 [nnz], in mask order.

        Raises:
            ValueError: entries of ``weight`` overlap in memory.
        """
        return self._offsets(weight).long()

    def to_bits(self) -> Tensor:
        """The packed bitmask, int32 [rows, words], of the parameter flattened after its first dimension."""
        return gk.pack_bits(self.to_dense().reshape(matrix_shape(self.shape)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, nnz={self.nnz})"


def memory_row(tensor: Tensor) -> Tensor:
    """The memory of a tensor as [1, 1, places], a shape that no compact gradient has, so none can be mistaken."""
    return memory_of(tensor).view(1, 1, -1)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter flattened after its first dimension; a scalar has one of each."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
