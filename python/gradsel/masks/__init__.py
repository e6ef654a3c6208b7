"""Masks: which entries of one parameter are trained. One small object a parameter, the same verbs for every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradsel.masks.base import Mask, Operands, Place
from gradsel.masks.flat import Flat, Frozen, Whole
from gradsel.masks.viewed import PerRow, WholeColumns, WholeRows
from gradsel.views import NeuronView

__all__ = [
    "Flat", "Frozen", "Mask", "Operands", "PerRow", "Place", "Whole", "WholeColumns", "WholeRows", "from_parts",
]  # fmt: skip


def from_parts(kind: str, shape: Sequence[int], description: dict[str, Any], tensors: dict[str, Tensor]) -> Mask:
    """The inverse of :meth:`Mask.describe` and :meth:`Mask.tensors`.

    Raises:
        TypeError, ValueError, KeyError: parts that make no mask, such as those of a damaged file.
    """
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"a shape is a list of sizes, got {shape!r}")
    if kind == PerRow.kind:
        view = NeuronView(tuple(description["row_dims"]), description["groups"])
        return PerRow(tensors["cols"], shape, view)
    if kind in (WholeRows.kind, WholeColumns.kind):
        view = NeuronView(tuple(description["row_dims"]), description["groups"])
        if kind == WholeRows.kind:
            return WholeRows(tensors["rows"], shape, view)
        return WholeColumns(tensors["cols"], shape, view)
    if kind == Flat.kind:
        return Flat(tensors["indices"], shape)
    if kind == Whole.kind:
        return Whole(shape)
    if kind == Frozen.kind:
        return Frozen(shape, str(description["reason"]))
    raise ValueError(f"unknown kind of mask {kind!r}")
