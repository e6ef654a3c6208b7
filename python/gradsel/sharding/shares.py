"""Which selected entries of a sharded weight this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsel.masks import Flat, Mask, PerRow, WholeColumns, WholeRows
from gradsel.sharding.tensors import box_of, local_of, sum_over_shards


@dataclass(frozen=True, eq=False)
class Share:
    """The selected entries in one shard of a weight.

    Attributes:
        mask: those entries, as entries of the shard.
        at: where they are in the mask order of the whole weight: a slice, or int64 [nnz of the shard].
    """

    mask: Mask
    at: slice | Tensor

    def of(self, values: Tensor) -> Tensor:
        """Their values, in the mask order of the shard, out of those of the whole weight, which are on any device."""
        at = self.at if isinstance(self.at, slice) else self.at.to(values.device)
        return values.reshape(-1)[at].view(self.mask.compact_shape).to(self.mask.device)


def share_of(mask: Mask, weight: Tensor) -> Share:
    """The share of this rank, on the device of what it holds of the weight.

    Args:
        mask: of the whole weight, on any device.
        weight: a DTensor, sharded along any dimensions of any mesh.
    """
    shape, offset = box_of(weight)
    device = local_of(weight).device
    if shape[1:] == mask.shape[1:] and (by_rows := _of_rows(mask, shape, offset[0])) is not None:
        return Share(by_rows.mask.to(device), by_rows.at)
    entries = mask.ordered_entries()
    coordinates = torch.unravel_index(entries, mask.shape)
    inside = torch.ones_like(entries, dtype=torch.bool)
    numbers = torch.zeros_like(entries)
    for found, first, size in zip(coordinates, offset, shape, strict=True):
        inside &= (found >= first) & (found < first + size)
        numbers = numbers * size + (found - first)
    numbers, order = numbers[inside].sort()
    return Share(Flat(numbers, shape).to(device), inside.nonzero().view(-1)[order].to(device))


@torch.no_grad()
def entries_of(mask: Mask, weight: Tensor, share: Share | None = None) -> Tensor:
    """The selected entries of a DTensor, in mask order, on every rank. A collective call that sends nnz numbers.

    Bits are kept: ranks without an entry add an integer zero to it.
    """
    share = share_of(mask, weight) if share is None else share
    held = share.mask.gather(local_of(weight))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
    bits = torch.zeros(mask.nnz, dtype=integers, device=held.device)
    bits[share.at] = held.reshape(-1).view(integers)
    sent = bits.to(torch.int32) if integers is torch.int16 else bits  # gloo adds no int16
    return sum_over_shards(sent, weight).to(integers).view(held.dtype).view(mask.compact_shape)


def _of_rows(mask: Mask, shape: tuple[int, ...], first: int) -> Share | None:
    """Where a shard is a number of rows, the mask order keeps the entries of masks by rows together."""
    end = first + shape[0]
    if isinstance(mask, Flat):
        n = mask.numel // max(mask.shape[0], 1)
        begin, stop = _between(mask.indices, first * n, end * n)
        return Share(Flat(mask.indices[begin:stop] - first * n, shape), slice(begin, stop))
    if not isinstance(mask, (PerRow, WholeRows, WholeColumns)) or not mask.view.is_first_dim:
        return None
    if isinstance(mask, WholeRows):
        n = mask.rows_and_columns[1]
        begin, stop = _between(mask.rows, first, end)
        return Share(WholeRows(mask.rows[begin:stop] - first, shape), slice(begin * n, stop * n))
    k = mask.compact_shape[1]
    if isinstance(mask, WholeColumns):
        return Share(WholeColumns(mask.cols, shape), slice(first * k, end * k))
    return Share(PerRow(mask.cols[first:end], shape), slice(first * k, end * k))


def _between(ascending: Tensor, first: int, end: int) -> tuple[int, int]:
    """The positions of the numbers from ``first`` to before ``end``."""
    limits = torch.tensor([first, end], dtype=ascending.dtype, device=ascending.device)
    begin, stop = torch.searchsorted(ascending, limits).tolist()
    return begin, stop


def by_rows(mask: Mask, weight: Tensor) -> bool:
    """Whether values can be sharded like a DTensor: both by rows, and a row of the one for each of the other."""
    if not isinstance(mask, (PerRow, WholeColumns)) or not mask.view.is_first_dim:
        return False
    placements = getattr(weight, "placements", ())
    # With tensor parallelism, FSDP's own placement has the dimension, and says that it is no Shard.
    return all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in placements)


def is_aligned(mask: Mask, weight: Tensor, values: Tensor) -> bool:
    """Whether every rank's shard of ``values`` holds the values of its own shard of ``weight``.

    It depends on nothing that differs between ranks.
    """
    alike = all(getattr(values, key, None) == getattr(weight, key, None) for key in ("device_mesh", "placements"))
    return alike and by_rows(mask, weight)
