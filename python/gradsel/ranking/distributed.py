"""Selecting jointly with other processes, each of which sees part of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradsel.dtypes import trained_dtype
from gradsel.errors import OtherRankFailed
from gradsel.sharding import group_of, is_sharded, mesh_of


def process_group_of(model: nn.Module, ranked: Mapping[str, Tensor]) -> dist.ProcessGroup | None:
    """The ranks that hold a DTensor, or those of DistributedDataParallel modules in a model; None without either."""
    for parameter in ranked.values():
        if is_sharded(parameter):
            return group_of(mesh_of(parameter))
    groups = [wrapper.process_group for wrapper in _wrappers(model)]
    if any(group is not groups[0] for group in groups):
        raise ValueError("parts of the model have different process groups; pass process_group=")
    return groups[0] if groups else None


def _wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Stops DistributedDataParallel from reducing gradients and from broadcasting buffers.

    Gradients are added once, at the end; broadcasting would need the same number of batches on every rank.
    """
    wrappers = _wrappers(model)
    before = [wrapper.require_forward_param_sync for wrapper in wrappers]
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(wrapper.no_sync())
            wrapper.require_forward_param_sync = False
        try:
            yield
        finally:
            for wrapper, flag in zip(wrappers, before, strict=True):
                wrapper.require_forward_param_sync = flag


@contextmanager
def failing_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raises an error on all ranks if one of them fails, as the others would otherwise wait for it forever.

    Raises:
        OtherRankFailed: another rank has failed; the message says which one, and with what error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if group is not None:
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, None if failure is None else f"{type(failure).__name__}: {failure}", group=group)
        others = [f"rank {rank} failed with {text}" for rank, text in enumerate(told) if text is not None]
        if failure is None and others:
            raise OtherRankFailed(f"the selection was stopped because {others[0]}")
    if failure is not None:
        raise failure


def total_over(count: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The sum of ``count`` over all ranks."""
    if group is None:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total, group=group)
    return int(total)


def add_over(totals: dict[str, Tensor], members: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Adds up the sums of all ranks, in place; a parameter without a gradient on a rank counts as zero there.

    FSDP has averaged the gradients of DTensors over the ranks already. Beside them, others are averaged, too.

    Args:
        totals: the sums that this rank has, by name.
        members: the parameters, in the same order on every rank.
    """
    device = next(iter(members.values())).device
    share = 1 / dist.get_world_size(group) if any(map(is_sharded, members.values())) else 1.0
    members = {name: parameter for name, parameter in members.items() if not is_sharded(parameter)}
    have = torch.tensor([name in totals for name in members], dtype=torch.uint8, device=device)
    dist.all_reduce(have, dist.ReduceOp.MAX, group=group)
    for (name, parameter), anywhere in zip(members.items(), have.tolist(), strict=True):
        if anywhere:
            own = totals.get(name)
            total = torch.zeros_like(parameter, dtype=trained_dtype(parameter)) if own is None else own
            reduced = total.to(parameter.device).contiguous()
            dist.all_reduce(reduced, group=group)
            totals[name] = reduced.mul_(share).to(total.device)
