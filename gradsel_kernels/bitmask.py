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
