"""Union, intersection and difference of masks, and the most regular kind of mask for a set of entries.

Sets of entries are sorted int64 vectors of row-major indices, so the work grows with the number of selected entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradsel.masks.base import Mask
from gradsel.masks.flat import Flat, Frozen, Whole
from gradsel.masks.viewed import Lines, PerRow, Viewed, WholeColumns, WholeRows
from gradsel.views import NeuronView


def union(a: Mask, b: Mask) -> Mask:
    """What either mask selects.

    Both masks must have the same shape, here and below. A result that equals one of them is that mask, reason included.
    """
    if not b.nnz or _is_full(a):
        return _simplest(a)
    if not a.nnz or _is_full(b):
        return _simplest(b)
    return _combined(lambda x, y: torch.cat([x, y]).unique(), a, b)


def intersection(a: Mask, b: Mask) -> Mask:
    """What both select."""
    if not a.nnz or _is_full(b):
        return _simplest(a)
    if not b.nnz or _is_full(a):
        return _simplest(b)
    return _combined(lambda x, y: x[_found(x, y)], a, b)


def difference(a: Mask, b: Mask) -> Mask:
    """What ``a`` selects and ``b`` does not."""
    if not a.nnz or not b.nnz:
        return _simplest(a)
    if _is_full(b):
        return Frozen(a.shape)
    return _combined(lambda x, y: x[~_found(x, y)], a, b)


def shared_entries(a: Mask, b: Mask) -> int:
    """How many entries both select."""
    if not a.nnz or _is_full(b):
        return a.nnz
    if not b.nnz or _is_full(a):
        return b.nnz
    few, many = sorted((a, b), key=lambda mask: mask.nnz)
    entries = few.entries()
    return int(_found(entries, many.entries().to(entries.device)).sum())


def recognised(entries: Tensor, shape: Sequence[int]) -> Mask:
    """The most regular mask with these entries, in any neuron view that layers have; for imports.

    Args:
        entries: int64 [nnz], row-major indices in the parameter, ascending and in range.
        shape: shape of the parameter.
    """
    shape = tuple(shape)
    if 0 < entries.numel() < math.prod(shape):
        for view, finders in _likely(len(shape)):
            numbers = _in_view(entries, shape, view)
            for find in finders:
                if mask := find(numbers, shape, view):
                    return mask
    return _regular(entries, shape, None)


Finder = Callable[[Tensor, tuple[int, ...], NeuronView], Mask | None]


def _likely(ndim: int) -> list[tuple[NeuronView, Sequence[Finder]]]:
    """The neuron views of weights with ``ndim`` dimensions, each with the kinds to look for, in order.

    In three dimensions, whole rows of the coarse view (neurons of a Conv1d, whole experts) are also whole rows of the
    finer views, and a mask per row of a finer view is also one of the coarse view. The more telling kind comes first.
    """
    if ndim < 2:
        return []
    rows, rest = (_rows,), (_columns, _per_row)
    finer = [(NeuronView((0, last)), (*rows, *rest)) for last in (1, 2)] if ndim == 3 else []
    return [(NeuronView(), rows), *finer, (NeuronView(), rest), (NeuronView((1,)), (*rows, *rest))]


def _is_full(mask: Mask) -> bool:
    return mask.nnz == mask.numel


def _simplest(mask: Mask) -> Mask:
    """The mask, or Whole or Frozen if it selects everything or nothing."""
    if not mask.nnz:
        return mask if isinstance(mask, (Whole, Frozen)) else Frozen(mask.shape)
    return Whole(mask.shape) if _is_full(mask) else mask


def _combined(operation: Callable[[Tensor, Tensor], Tensor], a: Mask, b: Mask) -> Mask:
    """Applies ``operation`` to the lines of two masks made of whole lines in one view, otherwise to their entries."""
    if isinstance(a, Lines) and isinstance(b, Lines) and type(a) is type(b) and a.view == b.view:
        lines = operation(a.lines.long(), b.lines.to(a.device).long())
        return _simplest(type(a)(lines.to(torch.int32), a.shape, a.view))
    entries = a.entries()
    return _regular(operation(entries, b.entries().to(entries.device)), a.shape, _common_view(a, b))


def _common_view(a: Mask, b: Mask) -> NeuronView | None:
    """The view of the masks that have one, None if these differ; rows of the parameter if neither mask has a view."""
    views = {mask.view for mask in (a, b) if isinstance(mask, Viewed)}
    if not views and len(a.shape) >= 2:
        return NeuronView()
    return views.pop() if len(views) == 1 else None


def _regular(entries: Tensor, shape: tuple[int, ...], view: NeuronView | None) -> Mask:
    """Frozen, Whole, PerRow in this view, or Flat."""
    if not entries.numel():
        return Frozen(shape)
    if entries.numel() == math.prod(shape):
        return Whole(shape)
    per_row = view and _per_row(_in_view(entries, shape, view), shape, view)
    return per_row or Flat(entries, shape)


def _per_row(numbers: Tensor, shape: tuple[int, ...], view: NeuronView) -> PerRow | None:
    rows, n = view.shape(shape)
    if numbers.numel() % rows:
        return None
    by_row = numbers.view(rows, -1)
    if not torch.equal(by_row // n, torch.arange(rows, device=numbers.device).unsqueeze(1).expand_as(by_row)):
        return None
    return PerRow((by_row % n).to(torch.int32), shape, view)


def _rows(numbers: Tensor, shape: tuple[int, ...], view: NeuronView) -> WholeRows | None:
    n = view.shape(shape)[1]
    rows = (numbers // n).unique_consecutive()
    return WholeRows(rows.to(torch.int32), shape, view) if rows.numel() * n == numbers.numel() else None


def _columns(numbers: Tensor, shape: tuple[int, ...], view: NeuronView) -> WholeColumns | None:
    rows, n = view.shape(shape)
    if rows == 1 or numbers.numel() % rows:  # columns of a single row are just entries
        return None
    cols = (numbers % n).unique()
    return WholeColumns(cols.to(torch.int32), shape, view) if cols.numel() * rows == numbers.numel() else None


def _in_view(entries: Tensor, shape: tuple[int, ...], view: NeuronView) -> Tensor:
    """Turns row-major indices in the parameter into row-major indices in its neuron view, ascending."""
    return entries if view.is_leading else view.numbers(entries, shape).sort().values


def _found(numbers: Tensor, among: Tensor) -> Tensor:
    """bool: which of ``numbers`` are in ``among``. Both are sorted, and ``among`` is not empty."""
    places = torch.searchsorted(among, numbers).clamp_(max=among.numel() - 1)
    return among[places] == numbers


def same(a: Mask, b: Mask) -> bool:
    """Whether two masks have the same kind, shape, view and entries, on whatever devices their indices are."""
    if (a.kind, a.shape, a.describe()) != (b.kind, b.shape, b.describe()):
        return False
    theirs = b.tensors()
    return all(torch.equal(tensor.cpu(), theirs[name].cpu()) for name, tensor in a.tensors().items())
