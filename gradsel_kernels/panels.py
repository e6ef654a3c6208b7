"""Selected weight gradients by dense products, one panel of rows at a time: plain torch, for any device.

A dense product takes rows x columns x tokens multiplications where the selection needs nnz x tokens, but each takes a
fraction of the time. A panel is dropped once its selected entries are taken, so nothing as large as the gradient of the
whole weight ever exists. Indices are trusted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradsel_kernels._checks import sum_dtype

#: The most elements in a panel, and the fewest panels: large products are fast, small ones take little memory.
PANEL_SIZE, PANELS = 2**20, 4
#: Groups of rows that :func:`union` tries.
GROUPS = 8
#: Multiplications that take as long as copying one element: groups must save more than this for each element they copy.
#: Measured in float32 on a Zen 4 with AVX-512: 50, from 0.02 ns for a multiplication and 1 ns for a copy.
COPY = 64
#: Tokens converted to float32 at a time on the CPU, where products of 16-bit tensors are rounded to 16 bits.
TOKENS = 4096


class _Panel(NamedTuple):
    """One dense product. Rows and entries are numbered in the order of the plan."""

    rows: slice
    entries: slice
    columns: Tensor | None  #: of the product; None: all
    picks: Tensor  #: int32, the places of its entries in the product


class _PanelPlan(NamedTuple):
    """What :func:`union` multiplies, and in which order."""

    panels: list[_Panel]
    rows: Tensor | None  #: the order of the rows; None: as they are
    entries: Tensor | None  #: the order of the entries, likewise
    made_for: tuple[int, Tensor | None, int]  #: the version of cols, row_offsets, and the version of row_offsets


_plans = WeakIdKeyDictionary()


def union(grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None) -> Tensor:
    """Multiplies the columns that any row uses or, where that saves enough, those that any row of a group uses.

    What to multiply depends on ``cols`` and ``row_offsets`` alone, so it is kept while ``cols`` lives unchanged.
    """
    plan = _plan(cols, row_offsets)
    grad = _run(grad_output, input, plan.panels, cols.numel(), plan.rows)
    if plan.entries is not None:
        grad = torch.empty_like(grad).index_copy_(0, plan.entries, grad)
    return grad.view(cols.shape)


def tile(grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None) -> Tensor:
    """Multiplies all columns, and prepares nothing."""
    first = _first_entries(cols, row_offsets)
    panels = _cut(first, 0, first.shape[0] - 1, None, input.shape[-1], cols.reshape(-1))
    return _run(grad_output, input, panels, cols.numel(), None).view(cols.shape)


def token_sums(grad_output: Tensor) -> Tensor:
    """The gradient of the bias: ``grad_output`` summed over everything but its features."""
    return grad_output.sum(tuple(range(grad_output.ndim - 1)), dtype=sum_dtype(grad_output.dtype))


def _run(grad_output: Tensor, input: Tensor, panels: Iterable[_Panel], nnz: int, order: Tensor | None) -> Tensor:
    """The entries in the order of the plan."""
    total = sum_dtype(input.dtype)
    grad_output = grad_output.flatten(0, -2)
    input = right = input.flatten(0, -2)
    grad = torch.empty(nnz, dtype=total, device=input.device)
    columns = None
    for panel in panels:
        if panel.columns is not columns:
            columns = panel.columns
            right = input if columns is None else input.mT.index_select(0, columns).mT
        rows = panel.rows
        left = grad_output[:, rows] if order is None else grad_output.index_select(1, order[rows])
        product = _product(left, right, total)
        torch.index_select(product.view(-1), 0, panel.picks, out=grad[panel.entries])
    return grad


def _product(left: Tensor, right: Tensor, total: torch.dtype) -> Tensor:
    """``left.T @ right`` in the dtype of sums."""
    if left.dtype is total:
        return left.mT @ right
    if left.is_cuda:
        return torch.mm(left.mT, right, out_dtype=total)
    product = torch.zeros((left.shape[1], right.shape[1]), dtype=total, device=left.device)
    for start in range(0, left.shape[0], TOKENS):
        tokens = slice(start, start + TOKENS)
        product.addmm_(left[tokens].to(total).mT, right[tokens].to(total))
    return product


def _first_entries(cols: Tensor, row_offsets: Tensor | None) -> Tensor:
    """Row r has the entries first[r] to first[r + 1] - 1."""
    if row_offsets is not None:
        return row_offsets
    rows, k = cols.shape
    return torch.arange(rows + 1, device=cols.device) * k


def _rows_of_entries(first: Tensor) -> Tensor:
    return torch.arange(first.shape[0] - 1, device=first.device).repeat_interleave(first.diff())


def _cut(first: Tensor, begin: int, end: int, columns: Tensor | None, width: int, slots: Tensor) -> Iterator[_Panel]:
    """Panels of rows begin to end - 1; entry e lies in column slots[e] of its panel, which has ``width`` of them."""
    height = max(1, min(PANEL_SIZE // max(1, width), -(-(first.shape[0] - 1) // PANELS)))
    for start in range(begin, end, height):
        rows = slice(start, min(start + height, end))
        inner = first[start : rows.stop + 1]
        entries = slice(int(inner[0]), int(inner[-1]))
        row_starts = torch.arange(rows.stop - start, dtype=torch.int32, device=first.device) * width
        picks = row_starts.repeat_interleave(inner.diff(), output_size=entries.stop - entries.start)
        yield _Panel(rows, entries, columns, picks.add_(slots[entries]))


def _plan(cols: Tensor, row_offsets: Tensor | None) -> _PanelPlan:
    if cols.is_inference() or (row_offsets is not None and row_offsets.is_inference()):
        return _new_plan(cols, row_offsets, (0, None, 0))  # not kept: no version of theirs tells of changes
    made_for = (cols._version, row_offsets, 0 if row_offsets is None else row_offsets._version)
    plan = _plans.get(cols)
    if plan is None or plan.made_for[::2] != made_for[::2] or plan.made_for[1] is not row_offsets:
        plan = _plans[cols] = _new_plan(cols, row_offsets, made_for)
    return plan


def _new_plan(cols: Tensor, row_offsets: Tensor | None, made_for: tuple[int, Tensor | None, int]) -> _PanelPlan:
    first = _first_entries(cols, row_offsets)
    used, slots, popularity = cols.reshape(-1).unique(return_inverse=True, return_counts=True)
    row = _rows_of_entries(first)
    order = _order(row, slots, popularity, first.shape[0] - 1)
    if order is None:
        panels = list(_cut(first, 0, first.shape[0] - 1, used, used.shape[0], slots))
        return _PanelPlan(panels, None, None, made_for)
    entries = order.argsort()[row].argsort(stable=True)
    slots = slots[entries]
    first = torch.cat([first[:1], first.diff()[order].cumsum(0)])
    panels, begin = [], 0
    for group in order.tensor_split(GROUPS):
        end = begin + group.shape[0]
        inside = slice(int(first[begin]), int(first[end]))
        group_slots, slots[inside] = slots[inside].unique(return_inverse=True)
        panels += _cut(first, begin, end, used[group_slots], group_slots.shape[0], slots)
        begin = end
    return _PanelPlan(panels, order, entries, made_for)


def _order(row: Tensor, slots: Tensor, popularity: Tensor, rows: int) -> Tensor | None:
    """Rows by the least popular column that they use, for :data:`GROUPS` groups; None if groups save too little.

    All groups but the first then do without the columns that few rows use.
    """
    used = popularity.shape[0]
    if used == 0 or rows < GROUPS * PANELS:
        return None
    rank = popularity.argsort(stable=True).argsort()
    least = torch.full((rows,), used, device=row.device).scatter_reduce_(0, row, rank[slots], "amin")
    order = least.argsort(stable=True)
    group = torch.empty_like(order)
    sizes = []
    for i, members in enumerate(order.tensor_split(GROUPS)):
        group[members] = i
        sizes.append(members.shape[0])
    widths = torch.bincount((group[row] * used + slots).unique() // used, minlength=GROUPS).tolist()
    saved = rows * used - sum(size * width for size, width in zip(sizes, widths, strict=True))
    return order if saved > COPY * (rows + sum(widths) - used) else None
