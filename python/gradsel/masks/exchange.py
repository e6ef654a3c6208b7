"""Masks from and to the formats of other tools. Imports become the most regular kind with the same entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.masks.base import Mask, matrix_shape
from gradsel.masks.combining import recognised


def from_dense(mask: Tensor) -> Mask:
    """From a boolean mask shaped like the parameter.

    Raises:
        TypeError: ``mask`` is not bool.
    """
    if mask.dtype is not torch.bool:
        raise TypeError(f"a dense mask must be bool, got {mask.dtype}")
    return recognised(mask.reshape(-1).nonzero().view(-1), mask.shape)


def from_bits(bits: Tensor, shape: Sequence[int]) -> Mask:
    """From packed bits, int32 [rows, ceil(cols / 32)], of a parameter flattened after its first dimension.

    Raises:
        TypeError, ValueError: ``bits`` has another dtype or shape.
    """
    rows, cols = matrix_shape(tuple(shape))
    expected = (rows, -(-cols // 32))
    if bits.dtype is not torch.int32:
        raise TypeError(f"bits must be torch.int32, got {bits.dtype}")
    if tuple(bits.shape) != expected:
        raise ValueError(f"bits of a parameter {list(shape)} must be {list(expected)}, got {list(bits.shape)}")
    return recognised(gk.unpack_bits(bits, cols).reshape(-1).nonzero().view(-1), shape)


def from_coo(indices: Tensor, shape: Sequence[int]) -> Mask:
    """From the indices of a ``torch.sparse_coo_tensor``, int [ndim, nnz], in any order; duplicates count once.

    Raises:
        TypeError, ValueError: ``indices`` are not integers, have another number of dimensions, or are out of range.
    """
    shape = tuple(shape)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int64 [ndim, nnz], got {indices.dtype}")
    if indices.ndim != 2 or indices.shape[0] != len(shape):
        raise ValueError(f"indices of a parameter {list(shape)} must be [{len(shape)}, nnz], got {list(indices.shape)}")
    indices = indices.long()
    entries = torch.zeros(indices.shape[1], dtype=torch.int64, device=indices.device)
    for dim, (numbers, size) in enumerate(zip(indices, shape, strict=True)):
        if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= size):
            raise ValueError(
                f"indices of dimension {dim} must lie in 0 to {size - 1}, "
                f"found {int(numbers.min())} to {int(numbers.max())}"
            )
        entries = entries * size + numbers
    return recognised(entries.unique(), shape)


def to_coo(mask: Mask) -> Tensor:
    """The inverse of :func:`from_coo`: int64 [ndim, nnz] in row-major order, like a coalesced tensor's."""
    entries = mask.entries()
    indices = torch.empty(len(mask.shape), entries.numel(), dtype=torch.int64, device=entries.device)
    if mask.numel:
        for numbers, found in zip(indices, torch.unravel_index(entries, mask.shape), strict=True):
            numbers.copy_(found)
    return indices
