"""Products with the selected entries of a weight, without the rest of it."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsel_kernels._ops import OPS


def selected_addmm_(
    output: Tensor, input: Tensor, cols: Tensor, values: Tensor, *, row_offsets: Tensor | None = None
) -> Tensor:
    """Adds in place what the selected entries contribute to a linear layer's output.

    ``output[t, r] += sum_j input[t, cols[r, j]] * values[r, j]``, which is ``output.addmm_(input, D.T)`` for a matrix D
    of zeros with ``values`` at ``cols``. Inputs in other columns are not read.

    Args:
        output: [tokens, rows] in float32, bfloat16, float16 or float64, any strides that do not overlap.
        input: the layer's input in the same dtype, [tokens, n], any strides.
        cols: int32 [rows, k]; with ``row_offsets`` int32 [nnz].
        values: the entries in the shape of ``cols``, in float32 (float64 for float64). Sums are taken in this dtype,
            and rounded once when they have been added to ``output``.
        row_offsets: int64 [rows + 1], for rows with different numbers of entries: row r has the columns
            ``cols[row_offsets[r]:row_offsets[r + 1]]``.

    Returns:
        ``output``.

    Raises:
        RuntimeError: an argument requires grad and gradients are enabled; this is not differentiable.
        IndexError: a column lies outside 0 to n - 1; ``output`` is unchanged. On CUDA tensors the input in such a
            column counts as NaN.
    """
    if torch.is_grad_enabled() and (output.requires_grad or input.requires_grad or values.requires_grad):
        raise RuntimeError("selected_addmm_ is not differentiable, but an argument requires grad; use torch.no_grad()")
    OPS.selected_addmm_.default(output, input, cols, values, row_offsets)
    return output
