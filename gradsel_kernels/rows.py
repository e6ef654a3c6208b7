"""Reading and writing the selected entries of a neuron view."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsel_kernels._ops import OPS


def gather_rows(weight: Tensor, cols: Tensor) -> Tensor:
    """The selected entries of each row: ``out[r, j] = weight[r, cols[r, j]]``.

    Args:
        weight: [rows, n] in float32, bfloat16, float16 or float64, any strides.
        cols: int32 [rows, k], any strides.

    Returns:
        [rows, k] in the dtype of ``weight``, detached: no gradient flows back.

    Raises:
        IndexError: a column lies outside 0 to n - 1. On CUDA tensors columns are not checked, because that would
            synchronise the device. An entry out of range then reads as NaN, and memory outside is never accessed.
    """
    return OPS.gather_rows.default(weight.detach(), cols)


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> Tensor:
    """Writes the selected entries of each row in place: ``weight[r, cols[r, j]] = values[r, j]``.

    Args:
        weight: [rows, n], any strides that do not overlap. Entries that are not selected keep their bits.
        cols: int32 [rows, k], distinct within a row.
        values: [rows, k], rounded to the dtype of ``weight`` (to nearest even).

    Returns:
        ``weight``.

    Raises:
        RuntimeError: ``weight`` or ``values`` require grad and gradients are enabled; this is not differentiable.
        IndexError: a column lies outside 0 to n - 1; ``weight`` is unchanged. On CUDA tensors such an entry is skipped.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or values.requires_grad):
        raise RuntimeError("scatter_rows_ is not differentiable, but an argument requires grad; use torch.no_grad()")
    OPS.scatter_rows_.default(weight, cols, values)
    return weight
