"""Weights that tensor parallelism has split: from gradients of what a rank holds of them to those of values."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gradsel.masks import Mask
from gradsel.masks.weight_grad import Product
from gradsel.sharding.shares import Share, is_aligned, share_of
from gradsel.sharding.tensors import is_sharded, local_of, mesh_of, sum_over_shards
from gradsel.views import NeuronView


class Part:
    """What this rank multiplies with of a weight that is a DTensor in its module's forward.

    FSDP may have gathered it over a mesh of its own; on that of tensor parallelism it stays split.

    Args:
        mask: of the whole weight.
        weight: a DTensor, as the forward sees it.
    """

    def __init__(self, mask: Mask, weight: Tensor) -> None:
        self.mask = mask
        self.mesh, self.placements = mesh_of(weight), cast(Any, weight).placements
        self.share: Share = share_of(mask, weight)
        self.holds_any = bool(self.share.mask.nnz)
        self._product: Product | None = None

    def is_of(self, weight: Tensor) -> bool:
        """Whether a DTensor is split in the same way, on the same device."""
        there = cast(Any, weight)
        alike = there.device_mesh == self.mesh and there.placements == self.placements
        return alike and self.share.mask.device == local_of(weight).device

    @property
    def product(self) -> Product:
        """What the direct route of a Linear layer needs."""
        if self._product is None:
            self._product = self.share.mask.product(NeuronView())
        return self._product

    def factors(self, input: Tensor) -> list[Any] | None:
        """How outputs of a Linear layer have to be split so that each rank holds what its part of the weight needs.

        Args:
            input: a DTensor.

        Returns:
            The placements; None if the input is split in another way than Linear layers of tensor parallelism take.
        """
        from torch.distributed.tensor import Replicate, Shard

        found: list[Any] = []
        if input.ndim < 2 or cast(Any, input).device_mesh != self.mesh:
            return None
        for own, given in zip(self.placements, cast(Any, input).placements, strict=True):
            if own.is_shard(0) and given.is_replicate():
                found.append(Shard(input.ndim - 1))
            elif (own.is_shard(1) and given.is_shard(input.ndim - 1)) or (own.is_replicate() and given.is_replicate()):
                found.append(Replicate())
            else:
                return None
        return found

    def grad_of_values(self, entries: Tensor, weight: Tensor, values: Tensor) -> Tensor:
        """The gradient of all values, out of those of this rank's entries.

        Nothing is sent where each rank holds the values of its own rows. Otherwise the ranks add up ``nnz`` numbers.

        Args:
            entries: in the mask order of this rank's part.
            weight: as the forward sees it.
            values: those of the whole weight: a DTensor on the same mesh, or a tensor that all ranks hold alike.
        """
        from torch.distributed.tensor import DTensor, Partial

        shape = torch.Size(self.mask.compact_shape)
        stride = torch.empty(shape, device="meta").stride()
        if not is_sharded(values):
            return sum_over_shards(self._spread(entries), weight)
        placements = cast(Any, values).placements
        if is_aligned(self.mask, weight, values):
            return DTensor.from_local(entries, self.mesh, placements, run_check=False, shape=shape, stride=stride)
        sums = [own if own.is_replicate() else Partial() for own in self.placements]
        spread = DTensor.from_local(self._spread(entries), self.mesh, sums, run_check=False)
        return spread.redistribute(self.mesh, placements)

    def _spread(self, entries: Tensor) -> Tensor:
        """Entries of this rank among those of the whole weight, and zeros for those of others."""
        whole = entries.new_zeros(self.mask.nnz)
        whole[self.share.at] = entries.reshape(-1)
        return whole.view(self.mask.compact_shape)


def settled(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, once it has arrived: collectives that run beside others leave a promise."""
    local = local_of(tensor)
    return cast(Any, local).wait() if hasattr(local, "trigger_wait") else local
