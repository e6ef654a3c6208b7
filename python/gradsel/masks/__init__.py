"""Masks: which entries of a parameter are trained. One object per parameter, one set of methods for all kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradsel.masks.base import Mask, Place
from gradsel.masks.combining import difference, intersection, same, shared_entries, union
from gradsel.masks.exchange import from_bits, from_coo, from_dense, to_coo
from gradsel.masks.flat import Flat, Frozen, Whole
from gradsel.masks.identity import fingerprint
from gradsel.masks.viewed import PerRow, WholeColumns, WholeRows

__all__ = [
    "Flat", "Frozen", "Mask", "PerRow", "Place", "Whole", "WholeColumns", "WholeRows", "difference",
    "fingerprint", "from_bits", "from_coo", "from_dense", "from_parts", "intersection", "same", "shared_entries",
    "to_coo", "union",
]  # fmt: skip

_KINDS: dict[str, type[Mask]] = {mask.kind: mask for mask in (PerRow, WholeRows, WholeColumns, Flat, Whole, Frozen)}


def from_parts(kind: str, shape: Sequence[int], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mask:
    """The inverse of :meth:`Mask.describe`, and of :meth:`Mask.tensors` or :meth:`Mask.packed`.

    Raises:
        TypeError, ValueError, LookupError: the parts do not make a mask, as in a damaged file.
    """
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a shape is a list of sizes, got {shape!r}")
    if len(shape) > 64 or math.prod(max(size, 1) for size in shape) >= 2**63:
        raise ValueError("a shape with more than 64 dimensions or 2**63 entries")
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of mask {kind!r}, expected one of {', '.join(_KINDS)}")
    return _KINDS[kind].from_parts(tuple(shape), description, tensors)
