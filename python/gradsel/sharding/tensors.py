"""DTensors, as far as the library looks into them. ``torch.distributed.tensor`` is imported only where one is met."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: A shape, and where it begins in each dimension of a whole.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose entries several ranks hold."""
    return hasattr(tensor, "device_mesh")


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the same memory, without a gradient; a plain tensor itself."""
    return cast(Any, tensor)._local_tensor if is_sharded(tensor) else tensor


@torch.no_grad()
def whole_of(tensor: Tensor) -> Tensor:
    """All entries of a tensor, gathered from all ranks of its mesh; a plain tensor itself. A collective call."""
    return cast(Any, tensor).detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def mesh_of(tensor: Tensor) -> DeviceMesh:
    return cast(Any, tensor).device_mesh


def box_of(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Box:
    """The shape of what this rank holds of a DTensor, and where it begins in each dimension of the whole.

    Args:
        shape: of another tensor that is sharded like this one.
    """
    return _box(tuple(shape or tensor.shape), mesh_of(tensor), cast(Any, tensor).placements)


def _box(shape: tuple[int, ...], mesh: DeviceMesh, placements: Any) -> Box:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(size), tuple(offset)


def part_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """What a rank holds of ``whole`` if it is sharded like ``tensor``; an alias. For a plain one, all of it.

    Args:
        whole: the same on all ranks.
    """
    return _part(whole, box_of(tensor, tuple(whole.shape))) if is_sharded(tensor) else whole


def _part(whole: Tensor, box: Box) -> Tensor:
    shape, offset = box
    if 0 in shape:
        return whole.new_empty(shape)
    return whole[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))]


@torch.no_grad()
def sum_over_shards(own: Tensor, tensor: Tensor) -> Tensor:
    """Adds up, in place, what the ranks computed from their shards of a DTensor. A collective call."""
    for dim, placement in enumerate(getattr(tensor, "placements", ())):
        if not placement.is_replicate():
            dist.all_reduce(own, group=mesh_of(tensor).get_group(dim))
    return own


def sharded_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A DTensor of which every rank takes its part of ``whole``; see :func:`part_like`."""
    return sharded_as(whole.to(local_of(tensor).device), mesh_of(tensor), cast(Any, tensor).placements)


def sharded_as(whole: Tensor, mesh: DeviceMesh, placements: Any, box: Box | None = None) -> Tensor:
    """A DTensor with these placements, of which every rank takes its part of ``whole``.

    Args:
        box: where this part is, if it is known.
    """
    from torch.distributed.tensor import DTensor

    box = _box(tuple(whole.shape), mesh, placements) if box is None else box
    part = _part(whole, box).clone(memory_format=torch.contiguous_format)
    stride = whole.contiguous().stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=stride)


def placed_like(grad: Tensor, tensor: Tensor) -> Tensor:
    """A gradient with the placements of its DTensor; torch leaves sums that ranks have yet to add up, for example.

    A collective call, unless they are placed alike.
    """
    placements = getattr(tensor, "placements", None)
    return grad if getattr(grad, "placements", None) == placements else cast(Any, grad).redistribute(None, placements)


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    whole = mesh.size() == dist.get_world_size()
    return cast(dist.ProcessGroup, dist.group.WORLD) if whole else mesh._flatten().get_group()


def reshard(model: nn.Module) -> None:
    """Lets FSDP free what it has gathered, so that modules hold their shards.

    Raises:
        ValueError: the model is wrapped in the former FSDP, whose parameters are pieces of no matrix.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel, which puts all its parameters into one vector: "
                "shard it by torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate) instead"
            )
        if is_managed(module) and callable(free := getattr(module, "reshard", None)):
            free()


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP shards parameters of a module; not so for tensor parallelism."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def agree_over(mesh: DeviceMesh, own: Mapping[str, Hashable]) -> list[str]:
    """The keys under which the ranks of a mesh hold different things, or that some of them lack. A collective call."""
    different: set[str] = set()
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        everywhere: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, (dict(own), different), group=group)
        for other, known in everywhere:
            different |= known
            different |= {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
    return [key for key in own if key in different] + sorted(different - own.keys())


@contextmanager
def on_first_rank() -> Iterator[bool]:
    """Whether this process is the first of all, which alone writes. All of them leave the block together.

    Raises:
        RuntimeError: on the others, if the block has failed on the first one.
    """
    is_first, failure = dist.get_rank() == 0, ""
    try:
        yield is_first
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        told = [failure]
        dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise RuntimeError(f"the first rank has failed: {told[0]}")
