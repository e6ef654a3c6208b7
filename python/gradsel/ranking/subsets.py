"""GRFT's choice of the data to select on: the part of a data set with the smallest loss before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from gradsel.ranking.distributed import failing_together
from gradsel.ranking.preserving import preserved

Sample = TypeVar("Sample")


class EasiestSubset(Subset[Sample]):
    """A part of a data set, with the losses that it was chosen by.

    Attributes:
        part: its number among the parts, from 0.
        losses: the mean loss of every part; empty if there was only one part, which is not measured.
    """

    def __init__(self, dataset: Dataset[Sample], indices: Sequence[int], part: int, losses: Sequence[float]) -> None:
        super().__init__(dataset, indices)
        self.part = part
        self.losses = tuple(losses)


def easiest_subset(
    model: nn.Module,
    dataset: Dataset[Sample],
    loss: Callable[[Any, Any], Tensor],
    n: int,
    *,
    batches: Callable[[Subset[Sample]], Iterable[Any]],
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> EasiestSubset[Sample]:
    """Splits a data set at random and returns the part with the smallest loss, to select on (GRFT, section 4.4.6).

    Args:
        model: run without gradients, in the caller's mode, autocast and device. Modes, buffers and the global random
            number generators (torch, Python, NumPy) are restored, and every part starts from the same state, so that
            dropout draws the same numbers for all parts.
        dataset: map-style, with a length.
        loss: ``loss(model, batch)`` returns a scalar: the loss that selection will use.
        n: number of parts, whose sizes differ by at most one; GRFT tries 1 to 7. With 1, the whole data set is returned
            in its own order, without running the model.
        batches: makes batches of a part: ``lambda part: DataLoader(part, batch_size=32)``. Every batch has the same
            weight in the mean, whatever its size.
        seed: seed of the random split.
        process_group: ranks whose ``batches`` each make their share of a part; the mean is over all of them, so that
            all choose the same part.

    Returns:
        The easiest part (the first of equal ones), with its samples in random order.

    Raises:
        TypeError: ``dataset`` has no length.
        ValueError: ``n`` is below 1 or above the number of samples; or a part, named in the message, has no batches or
            a loss that is not a finite scalar.
    """
    if not isinstance(dataset, Sized):
        raise TypeError(f"easiest_subset needs a map-style data set with a length, got {type(dataset).__name__}")
    size = len(dataset)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    if n > size:
        raise ValueError(f"{size} samples cannot be split into n = {n} parts")
    if n == 1:
        return EasiestSubset(dataset, range(size), 0, ())
    # Parts stay shuffled: if the data set is sorted by class, a contrastive loss needs batches with several classes.
    order = torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    parts = [part.tolist() for part in order.tensor_split(n)]
    losses = []
    for number, indices in enumerate(parts):
        with preserved(model), torch.no_grad():
            part = Subset(dataset, indices)
            losses.append(_mean_loss(model, batches(part), loss, f"part {number} of {n}", process_group))
    best = losses.index(min(losses))
    return EasiestSubset(dataset, parts[best], best, losses)


def _mean_loss(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor], where: str,
    group: dist.ProcessGroup | None,
) -> float:  # fmt: skip
    values = []
    with failing_together(group):
        for number, batch in enumerate(batches):
            value = loss(model, batch)
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"the loss of batch {number} in {where} is not a scalar, its shape is {list(value.shape)}"
                )
            values.append(float(value))
            if not math.isfinite(values[-1]):
                raise ValueError(f"the loss of batch {number} in {where} is {values[-1]}, so it cannot be compared")
    if group is not None:
        shares: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shares, values, group=group)
        values = [value for share in shares for value in share]
    if not values:
        raise ValueError(f"batches gives nothing for {where}: is drop_last set, and the part smaller than a batch?")
    return math.fsum(values) / len(values)
