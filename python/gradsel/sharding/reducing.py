"""Gradients of values that FSDP does not know: they are reduced when backward has computed them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gradsel.sharding.tensors import local_of, mesh_of, sharded_as

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def reduced(values: Tensor, weight: Tensor, alike: DeviceMesh | None = None) -> Tensor:
    """A stand-in for values in a forward, whose gradient is averaged over ranks and goes to ``values``.

    A forward reads the weight and never the values, so nothing is gathered and the stand-in takes no memory.

    Args:
        values: a DTensor on the mesh of ``weight``, or a plain parameter that all ranks hold alike.
        weight: a DTensor.
        alike: a part of its mesh, that of tensor parallelism, whose ranks compute the same gradient.

    Returns:
        Zeros, in the shape of the values of the whole weight.
    """
    mesh = mesh_of(weight)
    names = () if alike is None else alike.mesh_dim_names or ()
    return _Reduced.apply(values, mesh, [name not in names for name in mesh.mesh_dim_names or [None] * mesh.ndim])


class _Reduced(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mesh: Any, averaged: list[bool]) -> Tensor:
        ctx.mesh, ctx.averaged, ctx.placements = mesh, averaged, getattr(values, "placements", None)
        return torch.zeros((), dtype=values.dtype, device=local_of(values).device).expand(values.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh = ctx.mesh
        ranks = math.prod(size for size, averaged in zip(mesh.shape, ctx.averaged, strict=True) if averaged)
        sums = [Partial() if averaged else Replicate() for averaged in ctx.averaged]
        own = DTensor.from_local(grad / ranks, mesh, sums, run_check=False)
        if ctx.placements is not None and all(to.is_shard() or to.is_replicate() for to in ctx.placements):
            return own.redistribute(mesh, ctx.placements), None, None
        whole = local_of(own.redistribute(mesh, [Replicate()] * mesh.ndim))
        return (whole if ctx.placements is None else sharded_as(whole, mesh, ctx.placements)), None, None
