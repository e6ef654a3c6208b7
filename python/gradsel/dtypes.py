"""The dtype in which selected entries are summed and trained."""

from __future__ import annotations

import torch
from torch import Tensor


def trained_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which entries of a tensor are summed and trained: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32
