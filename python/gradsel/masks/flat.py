"""Masks without rows and columns: any entries, all of them, none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

import gradsel_kernels as gk
from gradsel.masks.base import Mask, Place, matrix_shape, memory_row
from gradsel.masks.encoding import ascends, fewest_bytes, indices_of, narrow, no_part, part_of, widen


class Flat(Mask):
    """Any entries, by row-major index in the parameter: layer-wide selections, imported masks.

    Args:
        indices: int32 or int64 [nnz], ascending.
        shape: shape of the parameter.

    Raises:
        TypeError, ValueError: ``indices`` is not an int32 or int64 vector, or not strictly ascending in range.
    """

    kind = "irregular"

    def __init__(self, indices: Tensor, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        numel = math.prod(self.shape)
        if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
            raise TypeError(f"indices must be int32 or int64 [nnz], got {indices.dtype} {list(indices.shape)}")
        if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= numel or not ascends(indices)):
            raise ValueError(f"indices must ascend within 0 to {numel - 1}, the entries of {list(self.shape)}")
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

    def entries(self) -> Tensor:
        return self.indices.long()

    def ordered_entries(self) -> Tensor:
        return self.entries()

    def offsets(self, weight: Tensor) -> Tensor:
        return self.indices.long() if weight.is_contiguous() else super().offsets(weight)

    def used_columns(self) -> Tensor:
        return (self.indices.long() % max(matrix_shape(self.shape)[1], 1)).unique()

    def place(self, weight: Tensor) -> Place:
        if weight.ndim <= 2 or weight.is_contiguous():
            return Place(weight, self.indices, gk.Layout.FLAT)
        return Place(memory_row(weight), self._offsets(weight), gk.Layout.FLAT)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def _pick(self, entries: Tensor) -> Tensor:
        return entries.reshape(-1)[self.indices.long()]

    def to(self, device: torch.device) -> Flat:
        return self if self.indices.device == device else Flat(self.indices.to(device), self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"indices": self.indices}

    def packed(self) -> dict[str, Tensor]:
        numbers = narrow(self.indices, self.numel)
        return fewest_bytes("indices", numbers, (1, self.numel), lambda: self.to_dense().view(1, -1))

    def describe(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_parts(cls, shape: tuple[int, ...], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        part, tensor = part_of(tensors, "indices", "bits")
        if part == "bits":
            return cls(indices_of(tensor, math.prod(shape)), shape)
        return cls(widen(part, tensor, (torch.uint16, torch.int32, torch.int64)), shape)


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

    def entries(self) -> Tensor:
        return torch.arange(self.nnz)

    def ordered_entries(self) -> Tensor:
        return self.entries()

    def used_columns(self) -> Tensor:
        return torch.arange(matrix_shape(self.shape)[1])

    def place(self, weight: Tensor) -> Place:
        if weight.ndim <= 2 or weight.is_contiguous():
            return Place(weight, None, gk.Layout.ALL)
        return Place(memory_row(weight), self._offsets(weight), gk.Layout.FLAT)

    def to(self, device: torch.device) -> Whole:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_parts(cls, shape: tuple[int, ...], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        no_part(tensors)
        return cls(shape)


class Frozen(Mask):
    """No entry.

    Args:
        shape: shape of the parameter.
        reason: why it is not trained, in a few words.
    """

    kind = "frozen"
    compact_shape = (0,)

    def __init__(self, shape: Sequence[int], reason: str = "nothing selected") -> None:
        self.shape = tuple(shape)
        self.reason = reason

    @property
    def label(self) -> str:
        return self.reason

    def gather(self, weight: Tensor) -> Tensor:
        return weight.new_empty(0)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        return None

    def to_dense(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.bool)

    def entries(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def ordered_entries(self) -> Tensor:
        return self.entries()

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

    @classmethod
    def from_parts(cls, shape: tuple[int, ...], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        no_part(tensors)
        return cls(shape, str(description["reason"]))
