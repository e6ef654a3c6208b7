"""Selected weight gradients: only those entries of a layer's weight gradient that a mask selects."""

from __future__ import annotations

from torch import Tensor

from gradsel_kernels._ops import OPS


def take_columns(input: Tensor, columns: Tensor) -> Tensor:
    """Copies the columns of an activation that :func:`selected_weight_grad` will need: ``input[..., columns].mT``.

    Args:
        input: [tokens, n] or [batch, tokens, n] in float32, bfloat16, float16 or float64, any strides.
        columns: int32 [count].

    Returns:
        [count, tokens] or [batch, count, tokens], contiguous, so that the tokens of a column lie in the order in which
        backward reads them. Detached: no gradient flows back.

    Raises:
        IndexError: a column lies outside 0 to n - 1. On CUDA tensors it reads as NaN instead.
    """
    return OPS.take_columns.default(input.detach(), columns)


def selected_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    cols: Tensor,
    strategy: str = "auto",
    *,
    row_offsets: Tensor | None = None,
) -> Tensor:
    """The selected entries of a linear layer's weight gradient, without forming the rest of it.

    ``out[r, j] = sum_t grad_output[t, r] * input[t, cols[r, j]]``, the entries ``cols`` of ``grad_output.T @ input``.

    Args:
        grad_output: gradient of the layer's output, [tokens, rows] or [batch, tokens, rows], in float32, bfloat16,
            float16 or float64, any strides.
        input: the layer's input in the same dtype, [tokens, n] or [batch, tokens, n], any strides. Fastest if the
            tokens of a column are adjacent in memory, as in ``take_columns(x, columns).mT``.
        cols: int32 [rows, k]; with ``row_offsets`` int32 [nnz].
        strategy: ``"auto"`` (by shape, see docs/selected-gradients.md), or one of

            - ``"gather"``: a separate sum for each entry, rows x k x tokens products in all;
            - ``"union"``: one dense product with the columns that any row uses, or one for each group of rows with
              similar columns; the selected entries are taken from it;
            - ``"tile"``: dense tiles of the product; each is freed as soon as its selected entries are taken.

            All are exact. They differ in speed and in the order of summation.
        row_offsets: int64 [rows + 1], for rows with different numbers of entries: row r has the columns
            ``cols[row_offsets[r]:row_offsets[r + 1]]``.

    Returns:
        [rows, k], or [nnz] with ``row_offsets``, in float32 (float64 for float64): the dtype of the sums.
        The same bits in every run.

    Raises:
        TypeError, ValueError: tensors that do not fit together, or an unknown strategy.
        IndexError: a column or an offset out of range. On CUDA tensors they are not checked, as in
            :func:`gather_rows`; a column out of range then gives NaN.
    """
    return OPS.selected_weight_grad.default(grad_output.detach(), input.detach(), cols, row_offsets, strategy)


def selected_weight_grad_bias(
    grad_output: Tensor,
    input: Tensor,
    cols: Tensor,
    strategy: str = "auto",
    *,
    row_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selected_weight_grad`, and the gradient of the bias: ``grad_output`` summed over its tokens.

    The kernels read ``grad_output`` once for both.

    Returns:
        The selected entries, and [rows] in the same dtype.
    """
    return OPS.selected_weight_grad_bias.default(grad_output.detach(), input.detach(), cols, row_offsets, strategy)
