"""Gradients of values that FSDP does not know: they are reduced when backward has computed them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gradsel.sharding.tensors import box_of, is_sharded, local_of, mesh_of, sharded_as

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Reduction:
    """How the gradient of values is averaged over ranks.

    It is made before a forward that torch.compile traces, because it asks placements, which cannot be traced.

    Args:
        values: a DTensor on the mesh of ``weight``, or a plain parameter that all ranks hold alike.
        weight: a DTensor.
        alike: a part of its mesh, that of tensor parallelism, whose ranks compute the same gradient.
    """

    def __init__(self, values: Tensor, weight: Tensor, alike: DeviceMesh | None = None) -> None:
        from torch.distributed.tensor import Partial, Replicate

        self.alike, self.mesh = alike, mesh_of(weight)
        names: Sequence[str] = () if alike is None else alike.mesh_dim_names or ()
        own: Sequence[str] = self.mesh.mesh_dim_names or [""] * self.mesh.ndim
        averaged = [name not in names for name in own]
        self.ranks = math.prod(self.mesh.size(dim) for dim, each in enumerate(averaged) if each)
        self.sums = [Partial() if each else Replicate() for each in averaged]
        self.everywhere = [Replicate()] * self.mesh.ndim
        self.placements = cast(Any, values).placements if is_sharded(values) else ()
        self.box = box_of(values) if is_sharded(values) else None
        self.at_once = bool(self.placements) and all(to.is_shard() or to.is_replicate() for to in self.placements)

    def stand_in(self, values: Tensor) -> Tensor:
        """A stand-in for values in a forward, whose gradient is averaged and goes to ``values``.

        A forward reads the weight and never the values, so nothing is gathered and the stand-in takes no memory.

        Returns:
            Zeros, in the shape of the values of the whole weight.
        """
        return _Reduced.apply(values, self)


class _Reduced(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, reduction: Reduction) -> Tensor:
        ctx.reduction = reduction
        return torch.zeros((), dtype=values.dtype, device=local_of(values).device).expand(values.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        from torch.distributed.tensor import DTensor

        to: Reduction = ctx.reduction
        own = DTensor.from_local(grad / to.ranks, to.mesh, to.sums, run_check=False)
        if to.at_once:
            return own.redistribute(to.mesh, to.placements), None
        whole = local_of(own.redistribute(to.mesh, to.everywhere))
        return (whole if to.box is None else sharded_as(whole, to.mesh, to.placements, to.box)), None
