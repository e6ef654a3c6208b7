"""Gradients of values that FSDP does not know: they are reduced when backward has computed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gradsel.sharding.tensors import local_of, mesh_of, sharded_as


def reduced(values: Tensor, weight: Tensor) -> Tensor:
    """A stand-in for values in a forward, whose gradient is averaged over all ranks and goes to ``values``.

    A forward reads the weight and never the values, so nothing is gathered and the stand-in takes no memory.

    Args:
        values: a DTensor on the mesh of ``weight``, or a plain parameter that all ranks hold alike.
        weight: a DTensor.

    Returns:
        Zeros, in the shape of the values of the whole weight.
    """
    return _Reduced.apply(values, mesh_of(weight))


class _Reduced(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mesh: Any) -> Tensor:
        ctx.mesh, ctx.placements = mesh, getattr(values, "placements", None)
        return torch.zeros((), dtype=values.dtype, device=local_of(values).device).expand(values.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh = ctx.mesh
        own = DTensor.from_local(grad / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
        if ctx.placements is not None and all(to.is_shard() or to.is_replicate() for to in ctx.placements):
            return own.redistribute(mesh, ctx.placements), None
        whole = local_of(own.redistribute(mesh, [Replicate()] * mesh.ndim))
        return (whole if ctx.placements is None else sharded_as(whole, mesh, ctx.placements)), None
