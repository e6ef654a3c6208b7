"""The dtype in which selected entries are summed and trained, how they compare with others, and sums of integers."""

from __future__ import annotations

import torch
from torch import Tensor


def trained_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which entries of a tensor are summed and trained: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def differs(entries: Tensor, others: Tensor) -> Tensor:
    """Where two tensors of a dtype hold different numbers, as bools. NaN counts as equal to NaN."""
    return (entries != others) & ~(entries.isnan() & others.isnan())


def adopted(values: Tensor, entries: Tensor) -> Tensor:
    """Values that have taken over what somebody has written to the entries that hold them, rounded to another dtype.

    Where an entry is still the rounded value, the value keeps its digits.
    """
    return torch.where(differs(entries, values.to(entries.dtype)), entries.to(values.dtype), values)


#: Entries of which :func:`integer_sum` makes int64 copies at a time.
_AT_ONCE = 2**22


def integer_sum(tensor: Tensor) -> int:
    """The sum of integers modulo 2**64, as int64. On the CPU, torch's sum makes an int64 copy of the whole tensor."""
    if not tensor.is_contiguous():
        return int(tensor.sum(dtype=torch.int64))
    parts = tensor.view(-1).split(_AT_ONCE)
    return int(torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()) if parts else 0
