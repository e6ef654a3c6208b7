"""The largest entries of a vector, the mask of some entries, and the inputs that keep most of a matrix's scores."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from gradsel.dtypes import trained_dtype
from gradsel.masks import Flat, Frozen, Mask, Whole
from gradsel.views import NeuronView

#: Number of columns whose gains are recomputed together.
_LOOK_AT = 32


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest magnitudes of a vector without NaN: int64, ascending, ties to the lowest."""
    if count >= values.numel():
        return torch.arange(values.numel(), device=values.device)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    magnitudes = values.abs()
    group = min(magnitudes.numel() // (2 * count), 64)
    if group < 4:
        return _largest_of(magnitudes, count)
    # At least ``count`` entries reach the bound, one per peak that does, so the largest are among those that reach it.
    peaks = magnitudes[: magnitudes.numel() // group * group].view(-1, group).amax(1)
    bound = peaks.topk(count, sorted=False).values.min()
    candidates = (magnitudes >= bound).nonzero().view(-1)
    return candidates[_largest_of(magnitudes[candidates], count)]


def _largest_of(magnitudes: Tensor, count: int) -> Tensor:
    threshold = magnitudes.topk(count, sorted=False).values.min()
    above = (magnitudes > threshold).nonzero().view(-1)
    ties = (magnitudes == threshold).nonzero().view(-1)[: count - above.numel()]
    return torch.cat([above, ties]).sort().values


def mask_of(entries: Tensor, shape: tuple[int, ...], view: NeuronView) -> Mask:
    """The mask of some entries, given by their row-major indices in the neuron view."""
    if entries.numel() == 0:
        return Frozen(shape, "nothing selected")
    if entries.numel() == math.prod(shape):
        return Whole(shape)
    if view.is_leading:
        return Flat(entries, shape)
    dense = torch.zeros(view.shape(shape), dtype=torch.bool, device=entries.device)
    dense.view(-1)[entries] = True
    return Flat.from_dense(view.undo(dense, shape))


def covering_columns(score: Tensor, k: int, count: int) -> Tensor:
    """The columns in which the ``k`` largest magnitudes of every row have the largest sum, found greedily.

    That sum is submodular in the set of columns: a column never gains more later than it did before. So only columns
    whose old gain still leads are evaluated again (Minoux 1978).

    Args:
        score: finite [rows, cols].
        k: entries per row.
        count: number of columns.

    Returns:
        int64 [count], ascending.
    """
    columns = score.abs().t().contiguous()  # [cols, rows]: one column is read at a time
    columns = columns.to(trained_dtype(columns))
    kept = columns.new_zeros(k, columns.shape[1])  # the best of every row in the chosen columns, ascending
    gains = columns.sum(1, dtype=torch.float64).cpu().numpy()
    seen_with = numpy.zeros(len(columns), dtype=int)  # number of chosen columns when each gain was computed
    chosen: list[int] = []
    while len(chosen) < min(count, len(columns)):
        best = int(gains.argmax())  # the first of equal ones
        if seen_with[best] == len(chosen):
            kept = torch.cat([kept, columns[best : best + 1]]).sort(0).values[1:]
            gains[best] = -1.0
            chosen.append(best)
        else:
            leading = numpy.argpartition(-gains, min(_LOOK_AT, len(gains)) - 1)[:_LOOK_AT]
            leading = numpy.union1d(leading, [best])  # among equal ones, argpartition may not take the first
            stale = leading[(seen_with[leading] != len(chosen)) & (gains[leading] >= 0)]
            added = columns[torch.from_numpy(stale).to(columns.device)].sub_(kept[0]).clamp_(min=0)
            gains[stale] = added.sum(1, dtype=torch.float64).cpu().numpy()
            seen_with[stale] = len(chosen)
    return torch.tensor(sorted(chosen), dtype=torch.int64, device=score.device)
