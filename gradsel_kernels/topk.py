"""Per-row top-K selection by magnitude: the mask of GPS, Eq. 5 (Zhang et al., CVPR 2024), for every neuron at once."""

from __future__ import annotations

from torch import Tensor

from gradsel_kernels._ops import OPS


def topk_rows(grad: Tensor, k: int) -> Tensor:
    """The columns of the ``k`` largest magnitudes in each row.

    Args:
        grad: [rows, n] in float32, bfloat16, float16 or float64; any strides, so a transposed view costs no copy.
        k: entries to select in each row, at least 1. All of a row are selected if it has fewer than ``k``.

    Returns:
        int32 [rows, min(k, n)], ascending in each row.

    The choice is the same on every backend: largest ``|grad|``; equal magnitudes go to the lowest column; NaN ranks
    above infinity, as in :func:`torch.topk`; -0.0 equals 0.0. Not differentiable.

    Raises:
        TypeError: ``grad`` is sparse, complex or not floating point.
        ValueError: ``grad`` is not 2-D, or ``k`` is below 1.
    """
    return OPS.topk_rows.default(grad, k)


def topk_rows_bits(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`topk_rows` and the packed bitmask of the same selection, in one pass over ``grad``.

    Returns:
        ``(cols, bits)``: int32 [rows, min(k, n)] and int32 [rows, ceil(n / 32)] as in :func:`pack_bits`.
    """
    return OPS.topk_rows_bits.default(grad, k)
