"""Packed bitmasks: bit j of the int32 word w of a row stands for column 32 w + j; spare bits are zero."""

from __future__ import annotations

from torch import Tensor

from gradsel_kernels._ops import OPS


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a boolean mask, one bit for each entry.

    Args:
        mask: bool [rows, n], any strides.

    Returns:
        int32 [rows, ceil(n / 32)].
    """
    return OPS.pack_bits.default(mask)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack_bits`.

    Args:
        bits: int32 [rows, ceil(n / 32)], any strides.
        n: columns of the mask. Bits past the last column are ignored.

    Returns:
        bool [rows, n].
    """
    return OPS.unpack_bits.default(bits, n)


def bits_to_cols(bits: Tensor, k: int) -> Tensor:
    """The columns of the set bits of a mask with ``k`` set bits in every row.

    Args:
        bits: int32 [rows, words], any strides.
        k: number of set bits in each row.

    Returns:
        int32 [rows, k], ascending in each row.

    Raises:
        ValueError: ``k`` is negative, or a row has more or fewer than ``k`` bits set. Finding out synchronises a CUDA
            device.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    cols = OPS.bits_to_cols.default(bits, k + 1)  # one more column shows whether a row has too many
    wrong = cols[:, k] >= 0
    if k:
        wrong = wrong | (cols[:, k - 1] < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        more = int(cols[row, k]) >= 0
        raise ValueError(
            f"every row must have k = {k} bits set, but row {row} has {'more' if more else 'fewer'}; "
            "masks whose rows differ are flat: unpack_bits(bits, n).flatten().nonzero()"
        )
    return cols[:, :k].contiguous()
