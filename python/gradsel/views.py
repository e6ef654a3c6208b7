"""Neuron views: any weight as a matrix with one row per output neuron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NeuronView:
    """Which dimensions of a weight number its output neurons.

    Rows of the matrix run over ``row_dims``, in that order, and columns over all other dimensions:

    =====================  ==============================  ==========  ======
    weight                 shape                           row_dims    groups
    =====================  ==============================  ==========  ======
    Linear, Conv           [out, in, ...]                  (0,)        1
    transformers' Conv1D   [in, out]                       (1,)        1
    stacked experts        [experts, out, in]              (0, 1)      1
    the same, transposed   [experts, in, out]              (0, 2)      1
    ConvTranspose          [in, out / groups, ...]         (1,)        1
    ConvTranspose, groups  [groups * in', out', ...]       (0, 2)      groups
    =====================  ==============================  ==========  ======

    Args:
        row_dims: the dimensions that number the neurons, counted after splitting the first one into ``groups``.
        groups: groups of a transposed convolution; if several, dimension 0 is seen as [groups, in / groups].
    """

    row_dims: tuple[int, ...] = (0,)
    groups: int = 1

    def shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(rows, cols) of a tensor of this shape."""
        sizes = self._split(shape)
        # Lists, because torch.compile cannot trace generators inside an autograd function.
        rows = math.prod([sizes[dim] for dim in self.row_dims])
        return rows, math.prod([size for dim, size in enumerate(sizes) if dim not in self.row_dims])

    def check(self, shape: Sequence[int]) -> None:
        """Checks that this view fits a shape.

        Raises:
            ValueError: ``row_dims`` are not distinct dimensions of it, or ``groups`` does not divide the first one.
        """
        if self.groups < 1 or (self.groups > 1 and (not shape or shape[0] % self.groups)):
            raise ValueError(f"groups = {self.groups} does not divide the first dimension of {list(shape)}")
        ndim = len(self._split(shape))
        if len(set(self.row_dims)) != len(self.row_dims) or not all(0 <= dim < ndim for dim in self.row_dims):
            raise ValueError(f"row_dims {self.row_dims} are not distinct dimensions of a tensor with {ndim}")

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix [rows, cols]: an alias of ``tensor`` if its strides allow one, otherwise a copy."""
        return self._permuted(tensor).reshape(self.shape(tensor.shape))

    def alias(self, tensor: Tensor) -> Tensor | None:
        """The matrix as an alias of ``tensor``, or None if no strides express it (channels_last, ConvTranspose)."""
        try:
            return self._permuted(tensor).view(self.shape(tensor.shape))
        except RuntimeError:
            return None

    def undo(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`of`: from [rows, cols] back to ``shape``."""
        sizes = self._split(shape)
        order = self._order(len(sizes))
        inverse = [order.index(dim) for dim in range(len(sizes))]
        return matrix.view([sizes[dim] for dim in order]).permute(inverse).reshape(tuple(shape))

    def places(self, numbers: Tensor, shape: Sequence[int]) -> Tensor:
        """Row-major indices in a tensor of the entries with these row-major indices in its matrix, computed by entry.

        Args:
            numbers: int64 [n], in range.
            shape: shape of the tensor.
        """
        return numbers if self.is_leading else _reordered(numbers, *self._orders(shape))

    def numbers(self, places: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`places`."""
        return places if self.is_leading else _reordered(places, *reversed(self._orders(shape)))

    def _orders(self, shape: Sequence[int]) -> list[list[tuple[int, int]]]:
        """The dimensions in the order of the matrix and in that of the tensor, each as its number and size."""
        sizes = self._split(shape)
        return [[(dim, sizes[dim]) for dim in self._order(len(sizes))], list(enumerate(sizes))]

    @property
    def is_first_dim(self) -> bool:
        """Whether rows are the first dimension alone, as in Linear and Conv."""
        return self.row_dims == (0,) and self.groups == 1

    @property
    def is_leading(self) -> bool:
        """Whether rows are the leading dimensions, so that a contiguous tensor holds one row after the other."""
        return self.groups == 1 and self.row_dims == tuple(range(len(self.row_dims)))

    def _split(self, shape: Sequence[int]) -> list[int]:
        return [*shape] if self.groups == 1 else [self.groups, shape[0] // self.groups, *shape[1:]]

    def _order(self, ndim: int) -> list[int]:
        return [*self.row_dims, *(dim for dim in range(ndim) if dim not in self.row_dims)]

    def _permuted(self, tensor: Tensor) -> Tensor:
        split = tensor if self.groups == 1 else tensor.unflatten(0, (self.groups, tensor.shape[0] // self.groups))
        return split if self.is_leading else split.permute(self._order(split.ndim))


def _reordered(numbers: Tensor, order: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> Tensor:
    """Row-major indices for dimensions in one order as those for the same dimensions in another one."""
    steps, step = {}, 1
    for dim, size in reversed(new):
        steps[dim], step = step, step * size
    found, rest = torch.zeros_like(numbers), numbers
    for dim, size in reversed(order):
        found += rest % max(size, 1) * steps[dim]
        rest = rest // max(size, 1)
    return found


def memory_extent(tensor: Tensor) -> int:
    """The number of places in memory from the first entry of a tensor to its last, gaps included.

    Raises:
        ValueError: entries of ``tensor`` overlap in memory, as those of an expanded one do.
    """
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"entries of a tensor of shape {list(tensor.shape)} and strides {tensor.stride()} share memory"
                )
            extent += stride * (size - 1)
    return extent if tensor.numel() else 0


def memory_of(tensor: Tensor) -> Tensor:
    """The memory from the first entry of a tensor to its last as a vector: an alias with the same version counter."""
    return tensor.detach().as_strided((memory_extent(tensor),), (1,))


def memory_offsets(tensor: Tensor) -> Tensor:
    """int64, shaped like ``tensor``: the position of each entry in memory, counted from the first.

    Raises:
        ValueError: entries of ``tensor`` overlap in memory.
    """
    return torch.arange(memory_extent(tensor), device=tensor.device).as_strided(tensor.shape, tensor.stride())
