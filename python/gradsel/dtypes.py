"""The dtype in which selected entries are summed and trained, and sums of integers."""

from __future__ import annotations

import torch
from torch import Tensor


def trained_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which entries of a tensor are summed and trained: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


#: Entries of which :func:`integer_sum` makes int64 copies at a time.
_AT_ONCE = 2**22


def integer_sum(tensor: Tensor) -> int:
    """The sum of integers modulo 2**64, as int64. On the CPU, torch's sum makes an int64 copy of the whole tensor."""
    if not tensor.is_contiguous():
        return int(tensor.sum(dtype=torch.int64))
    parts = tensor.view(-1).split(_AT_ONCE)
    return int(torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()) if parts else 0
