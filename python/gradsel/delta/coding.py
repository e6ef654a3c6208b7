"""The smallest encoding of a mask in a delta's file: that of ``Mask.packed()``, or the gaps between its entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsel.masks import Flat, Mask, PerRow, WholeRows, from_parts

_ESCAPES = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1}


def packed(mask: Mask) -> dict[str, Tensor]:
    """The tensors of a mask in as few bytes as possible, by part: those of ``Mask.packed()``, or ``gaps``."""
    best = mask.packed()
    if isinstance(mask, (PerRow, Flat)) and mask.nnz:
        steps = _steps(mask.entries() if isinstance(mask, Flat) else mask.numbers())
        for dtype, escape in _ESCAPES.items():
            size = dtype.itemsize * (steps.numel() + int((steps // escape).sum()))
            if size < sum(tensor.nbytes for tensor in best.values()):
                best = {"gaps": _coded(steps, dtype)}
    return best


def unpacked(kind: str, shape: Sequence[int], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mask:
    """The inverse of :func:`packed`, from the tensors and the result of ``Mask.describe()``, both untrusted.

    Raises:
        TypeError, ValueError, LookupError: the parts do not make a mask.
    """
    if tensors.keys() != {"gaps"}:
        return from_parts(kind, shape, description, tensors)
    numbers = from_gaps(tensors["gaps"])
    if kind == Flat.kind:
        return from_parts(kind, shape, description, {"indices": numbers})
    if kind != PerRow.kind:
        raise ValueError(f"a mask of kind {kind!r} has no gaps")
    no_rows = from_parts(WholeRows.kind, shape, description, {"rows": torch.empty(0, dtype=torch.int32)})
    assert isinstance(no_rows, WholeRows)  # it checks shape and view, and takes no memory
    rows, n = no_rows.rows_and_columns
    if not rows or not n or numbers.numel() % rows:
        raise ValueError(f"{numbers.numel()} entries are not the same number in each of {rows} rows of {n}")
    mask = PerRow((numbers % n).view(rows, -1).to(torch.int32), shape, no_rows.view)
    if not torch.equal(mask.numbers(), numbers):
        raise ValueError("gaps leave their rows")
    return mask


def to_gaps(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Ascending numbers as how many are left out before each: ``[0, 7, 299]`` is ``[0, 6, 255, 36]`` in uint8.

    The largest number of the dtype is an escape: it adds itself to the gap and continues with the next digit.

    Args:
        numbers: int64 [n], n > 0, from 0, strictly ascending.
        dtype: uint8 or uint16.

    Returns:
        ``dtype`` [digits].
    """
    return _coded(_steps(numbers), dtype)


def from_gaps(gaps: Tensor) -> Tensor:
    """The inverse of :func:`to_gaps`: int64 [n].

    Raises:
        TypeError, ValueError: ``gaps`` has another dtype, is not a vector, is empty, or ends in the middle of a gap.
    """
    if gaps.dtype not in _ESCAPES:
        raise TypeError(f"gaps must be uint8 or uint16, got {gaps.dtype}")
    if gaps.ndim != 1 or not gaps.numel():
        raise ValueError(f"gaps must be a vector with entries, got {list(gaps.shape)}")
    digits = gaps.to(torch.int64)
    ends = digits != _ESCAPES[gaps.dtype]
    if not bool(ends[-1]):
        raise ValueError("the last gap is cut off")
    left_out = digits.cumsum(0)[ends]
    return left_out + torch.arange(left_out.numel())


def _steps(numbers: Tensor) -> Tensor:
    return numbers.diff(prepend=numbers.new_full((1,), -1)) - 1


def _coded(steps: Tensor, dtype: torch.dtype) -> Tensor:
    escape = _ESCAPES[dtype]
    ends = (steps // escape + 1).cumsum(0) - 1
    digits = torch.full((int(ends[-1]) + 1,), escape, dtype=torch.int32, device=steps.device)
    digits[ends] = (steps % escape).to(torch.int32)
    return digits.to(dtype)
