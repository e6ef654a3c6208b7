"""Planning how gradients are collected: in how many passes, and within how much memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from gradsel.dtypes import trained_dtype
from gradsel.sharding import local_of

MODES = ("auto", "full", "streaming", "grouped")
#: ``auto`` plans to use at most this fraction of the free memory.
_FREE_SHARE = 0.5


@dataclass(frozen=True)
class GradientPlan:
    """How gradients are collected.

    Attributes:
        groups: for each pass over the data, the names of the parameters whose gradients it sums.
        streaming: there is a single backward pass, and each gradient is ranked and freed as soon as it arrives.
        offload: sums are kept on the CPU.
        sentence: the choice and its cost, for the selection's notes.
    """

    groups: list[list[str]]
    streaming: bool
    offload: bool
    sentence: str


def make_plan(
    ranked: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    memory: str,
    max_gradient_bytes: int | None,
    offload: bool,
    group: dist.ProcessGroup | None,
) -> GradientPlan:
    """Chooses how gradients are collected; takes the arguments of :func:`gradsel.select`.

    Raises:
        ValueError: the arguments contradict each other, or these batches do not allow what they ask for.
    """
    if memory not in MODES:
        raise ValueError(f"memory must be one of {', '.join(MODES)}, got {memory!r}")
    if max_gradient_bytes is not None and memory not in ("auto", "grouped"):
        raise ValueError(f"max_gradient_bytes is for memory='grouped', got memory={memory!r}")
    length = _length(batches)
    if memory == "streaming" and group is not None:
        raise ValueError("memory='streaming' cannot reduce gradients over ranks; use 'grouped'")
    if memory == "streaming" and length is not None and length > 1:
        raise ValueError(NOT_ONE)
    automatic = memory == "auto" and max_gradient_bytes is None
    if memory == "streaming" or (automatic and length == 1 and group is None):
        largest = max(map(_transient, ranked.values()))
        what = "each gradient is ranked and freed as soon as backward has it"
        return GradientPlan([list(ranked)], True, offload, f"streaming: {what}; the largest takes {_size(largest)}")

    devices = {parameter.device for parameter in ranked.values()}
    held = sum(map(_sum_bytes, ranked.values()))
    limit = max_gradient_bytes
    if limit is None and memory != "full" and not (automatic and isinstance(batches, Iterator)):
        limit = _free(devices, group)
        if automatic and limit is not None and not offload and any(device.type != "cpu" for device in devices):
            on_cpu = _free({torch.device("cpu")}, group)
            offload = _needed(ranked.values(), False) > limit and (on_cpu is None or held <= on_cpu)
        if limit is not None:  # half of the free memory is a guess; a single gradient has to fit anyway
            limit = max(limit, *(_needed([parameter], offload) for parameter in ranked.values()))
    needed = _needed(ranked.values(), offload)
    where = " on the CPU" if offload else ""
    if limit is None or needed <= limit:
        return GradientPlan(
            [list(ranked)], False, offload, f"full: one pass, {_size(held)} of gradient sums held{where}"
        )
    groups = _groups(ranked, limit, offload)
    if isinstance(batches, Iterator):
        asked = "max_gradient_bytes" if max_gradient_bytes is not None else "half of the free memory,"
        raise ValueError(
            f"{_size(needed)} of gradients exceed {asked} {_size(limit)}, so the data is needed {len(groups)} times, "
            "but batches is an iterator and yields it only once; pass a DataLoader or a list"
        )
    passes = f"{len(groups)} passes over the data, at most {_size(limit)} of gradients held"
    return GradientPlan(groups, False, offload, f"grouped: {passes}" + (", sums on the CPU" if offload else ""))


#: The error message for streaming with more than one batch.
NOT_ONE = (
    "memory='streaming' ranks each gradient as soon as it arrives, which is exact for one backward pass, but batches "
    "has more than one; join them into one batch, or use memory='grouped'"
)


def _length(batches: Iterable[Any]) -> int | None:
    """The number of batches, or None if it is unknown or unreliable."""
    if isinstance(getattr(batches, "dataset", None), IterableDataset):
        return None
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _sum_bytes(parameter: Tensor) -> int:
    return local_of(parameter).numel() * trained_dtype(parameter).itemsize


def _transient(parameter: Tensor) -> int:
    """Bytes of one gradient while it is added: the gradient and, in half precision, its float32 copy."""
    copied = trained_dtype(parameter) != parameter.dtype
    return parameter.numel() * parameter.element_size() + (_sum_bytes(parameter) if copied else 0)


def _needed(parameters: Iterable[Tensor], offload: bool) -> int:
    parameters = list(parameters)
    return (0 if offload else sum(map(_sum_bytes, parameters))) + max(map(_transient, parameters), default=0)


def _groups(ranked: Mapping[str, nn.Parameter], limit: int, offload: bool) -> list[list[str]]:
    """Groups of neighbouring parameters within the limit; backward stops at the first layer of a group."""
    groups: list[list[str]] = [[]]
    for name, parameter in ranked.items():
        if _needed([parameter], offload) > limit:
            raise ValueError(
                f"max_gradient_bytes={limit} is too little for {name} alone, which needs "
                f"{_needed([parameter], offload)} bytes"
            )
        if _needed([*(ranked[other] for other in groups[-1]), parameter], offload) > limit:
            groups.append([])
        groups[-1].append(name)
    return groups


def _free(devices: Iterable[torch.device], group: dist.ProcessGroup | None) -> int | None:
    """Bytes that a plan may use, the same on every rank; None if the system does not report them."""
    found = [_free_on(device) for device in devices]
    known = [free for free in found if free is not None]
    least = int(min(known) * _FREE_SHARE) if known else None
    if group is not None:
        everywhere: list[int | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, least, group=group)
        least = min((free for free in everywhere if free is not None), default=None)
    return least


def _free_on(device: torch.device) -> int | None:
    """Free bytes on a device, including what torch holds in reserve and within the limits of a container."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    found = [free for free in (_free_on_machine(), _free_in_container()) if free is not None]
    return min(found, default=None)


def _free_on_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _free_in_container() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit ("max"), or no such files
        return None


def _size(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count:,} bytes"
