"""The gradients that a selection ranks: collected over one or several passes, within a memory budget."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from gradsel.keeping import Buffers, RandomState
from gradsel.links import trained_dtype

MODES = ("auto", "full", "streaming", "grouped")
#: ``auto`` plans with at most this share of the memory that is free.
_FREE_SHARE = 0.5

#: ``loss(model, batch)``
Loss = Callable[[Any, Any], Tensor]
#: Takes the gradient of one parameter, by name, summed over all batches.
Deliver = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Plan:
    """How gradients are collected.

    Attributes:
        groups: the parameters, by name, whose gradients are summed in one pass over the data.
        streaming: there is one backward pass, and each gradient is ranked and freed as soon as it is there.
        offload: sums are kept on the CPU.
        sentence: what was chosen and what it costs.
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
) -> Plan:
    """Chooses how gradients are collected; arguments as in :func:`gradsel.select`.

    Raises:
        ValueError: the arguments contradict each other, or ask for what these batches cannot give.
    """
    if memory not in MODES:
        raise ValueError(f"memory must be one of {', '.join(MODES)}, got {memory!r}")
    if max_gradient_bytes is not None and memory not in ("auto", "grouped"):
        raise ValueError(f"max_gradient_bytes is for memory='grouped', got memory={memory!r}")
    one_batch = _length(batches) == 1
    if memory == "streaming" and group is not None:
        raise ValueError("memory='streaming' cannot reduce gradients over ranks; use 'grouped'")
    if memory == "streaming" and _length(batches) not in (None, 1):
        raise ValueError(_NOT_ONE)
    automatic = memory == "auto" and max_gradient_bytes is None
    if memory == "streaming" or (automatic and one_batch and group is None):
        largest = max(map(_transient, ranked.values()))
        what = "each gradient is ranked and freed as soon as backward has it"
        return Plan([list(ranked)], True, offload, f"streaming: {what}; the largest takes {_size(largest)}")

    devices = {parameter.device for parameter in ranked.values()}
    needed = _needed(ranked.values(), offload)
    held = sum(map(_sum_bytes, ranked.values()))
    limit = max_gradient_bytes
    if memory == "grouped" and limit is None:
        limit = _free(devices, group)
    elif automatic and not isinstance(batches, Iterator):
        limit = _free(devices, group)
        off_device = any(device.type != "cpu" for device in devices)
        if limit is not None and needed > limit and off_device and not offload:
            on_cpu = _free({torch.device("cpu")}, group)
            offload = on_cpu is None or held <= on_cpu
            needed = _needed(ranked.values(), offload)
    where = " on the CPU" if offload else ""
    if limit is None or needed <= limit:
        return Plan([list(ranked)], False, offload, f"full: one pass, {_size(held)} of gradient sums held{where}")
    groups = _groups(ranked, limit, offload)
    if len(groups) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"{_size(needed)} of gradients exceed max_gradient_bytes={limit}, so the data is needed {len(groups)} "
            "times, but batches can be gone through only once; pass a DataLoader or a list"
        )
    return Plan(
        groups, False, offload, f"grouped: {len(groups)} passes over the data, at most {_size(limit)} of gradients held"
    )


_NOT_ONE = (
    "memory='streaming' ranks each gradient as soon as it is there, which is exact for one backward pass, but batches "
    "has more than one; join them into one batch, or use memory='grouped'"
)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # no length, or a loader over an iterable data set
        return None


def _sum_bytes(parameter: Tensor) -> int:
    return parameter.numel() * trained_dtype(parameter).itemsize


def _transient(parameter: Tensor) -> int:
    """Bytes of one gradient while it is being added: itself, and its copy where it is in half precision."""
    copied = trained_dtype(parameter) != parameter.dtype
    return parameter.numel() * parameter.element_size() + (_sum_bytes(parameter) if copied else 0)


def _needed(parameters: Iterable[Tensor], offload: bool) -> int:
    parameters = list(parameters)
    return (0 if offload else sum(map(_sum_bytes, parameters))) + max(map(_transient, parameters), default=0)


def _groups(ranked: Mapping[str, nn.Parameter], limit: int, offload: bool) -> list[list[str]]:
    """Neighbouring parameters that fit the limit together; backward stops at the first layer of a group."""
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
    """Bytes that a plan may use, the same on every rank; None where the system does not say."""
    found = [_free_on(device) for device in devices]
    known = [free for free in found if free is not None]
    least = int(min(known) * _FREE_SHARE) if known else None
    if group is not None:
        everywhere: list[int | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, least, group=group)
        least = min((free for free in everywhere if free is not None), default=None)
    return least


def _free_on(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            free = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
        return free["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The process group of a model wrapped in DistributedDataParallel."""
    wrapper = _data_parallel(model)
    return None if wrapper is None else wrapper.process_group


def _data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


# --- Collecting --------------------------------------------------------------------------------------------------


@dataclass
class Collected:
    """What :func:`collect` saw.

    Attributes:
        batches: their number, over all ranks.
        names: the parameters that got any gradient.
    """

    batches: int = 0
    names: set[str] = field(default_factory=set)


def collect(
    model: nn.Module,
    ranked: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Loss,
    plan: Plan,
    deliver: Deliver,
    *,
    each_batch: Callable[[Tensor], Tensor] | None,
    loss_scale: float,
    group: dist.ProcessGroup | None,
    quiet: bool | None,
) -> Collected:
    """Sums the gradients of ``ranked`` over ``batches`` as planned and delivers each sum once. Changes the model's
    flags and gradients; call it inside :func:`gradsel.keeping.kept`.

    Sums are float32 (float64 for float64 parameters), in the order of the batches.

    Raises:
        ValueError: no batches; a loss that is no finite scalar or does not depend on the parameters; passes
            that differ.
    """
    result = Collected()
    replay = _Replay(model, batches, len(plan.groups))
    for number, names in enumerate(plan.groups):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        members = {name: ranked[name].requires_grad_(True) for name in names}
        sums = _Sums(each_batch, loss_scale, plan.offload, deliver if plan.streaming else None)
        title = "selection gradients" + (f", pass {number + 1} of {len(plan.groups)}" if len(plan.groups) > 1 else "")
        replay.rewind()
        with sums.watching(members), _unsynchronised(model):
            count = 0
            for batch in tqdm(batches, desc=title, unit="batch", disable=quiet, leave=False):
                count += 1
                if plan.streaming and count > 1:
                    raise ValueError(_NOT_ONE)
                value = _checked_loss(loss(model, batch), count)
                replay.check(batch, value)
                if value.requires_grad:
                    sums.begin()
                    (value * loss_scale).backward()
                elif len(plan.groups) == 1:
                    raise ValueError(f"{_NEEDED}, got a tensor {list(value.shape)} without a gradient")
        replay.ended()
        count = _reduced_count(count, group, next(iter(members.values())).device)
        if count == 0:
            raise ValueError("batches is empty: there is nothing to take gradients of")
        result.batches = count
        result.names |= sums.delivered
        if group is not None:
            sums.reduce(members, group)
        for name in members:
            if name in sums.totals:
                result.names.add(name)
                deliver(name, sums.totals.pop(name))  # freed as soon as it has been ranked
    if not result.names:
        raise ValueError(f"{_NEEDED}; none of them got a gradient")
    return result


_NEEDED = "loss(model, batch) must return a scalar that depends on the ranked parameters"


def _checked_loss(value: object, number: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{_NEEDED}, got {found}")
    if not bool(value.isfinite()):
        raise ValueError(f"the selection loss of batch {number} is {value.item()}, so its gradients mean nothing")
    return value


def _unsynchronised(model: nn.Module) -> Any:
    """Sums are reduced once, at the end, by :meth:`_Sums.reduce`."""
    wrapper = _data_parallel(model)
    return nullcontext() if wrapper is None else wrapper.no_sync()


def _reduced_count(count: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    if group is None:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total, group=group)
    return int(total)


class _Sums:
    """Takes every gradient away from its parameter as soon as backward has it."""

    def __init__(
        self,
        each_batch: Callable[[Tensor], Tensor] | None,
        loss_scale: float,
        offload: bool,
        deliver: Deliver | None,
    ) -> None:
        self._each_batch = each_batch
        self._loss_scale = loss_scale
        self._offload = offload
        self._deliver = deliver  # for streaming: there is nothing to add
        self._arrived: set[str] = set()
        self.delivered: set[str] = set()
        self.totals: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, members: Mapping[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, parameter in members.items():
                handle = parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p))
                stack.callback(handle.remove)
            yield

    def begin(self) -> None:
        """A backward pass begins."""
        self._arrived.clear()

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        if name in self._arrived and (self._each_batch is not None or self._deliver is not None):
            raise ValueError(
                f"the gradient of {name} arrives in parts, of which only the sum means anything: a weight shared by "
                "segments under reentrant checkpointing; use use_reentrant=False"
            )
        self._arrived.add(name)
        grad = grad.to_dense() if grad.layout is not torch.strided else grad
        grad = grad.to(torch.device("cpu") if self._offload else grad.device, trained_dtype(grad))
        if self._loss_scale != 1:
            grad = grad.div_(self._loss_scale)
        if self._each_batch is not None:
            grad = self._each_batch(grad)
        if self._deliver is not None:
            self.delivered.add(name)
            self._deliver(name, grad)
        elif name in self.totals:
            self.totals[name].add_(grad)
        else:
            self.totals[name] = grad

    def reduce(self, members: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        """Adds the sums of all ranks; a parameter without a gradient on one rank counts as zero there."""
        device = next(iter(members.values())).device
        have = torch.tensor([name in self.totals for name in members], dtype=torch.uint8, device=device)
        dist.all_reduce(have, dist.ReduceOp.MAX, group=group)
        for (name, parameter), anywhere in zip(members.items(), have.tolist(), strict=True):
            if anywhere:
                own = self.totals.get(name)
                total = torch.zeros_like(parameter, dtype=trained_dtype(parameter)) if own is None else own
                reduced = total.to(parameter.device).contiguous()
                dist.all_reduce(reduced, group=group)
                self.totals[name] = reduced.to(total.device)


class _Replay:
    """Makes several passes over the data alike, and finds out where they are not."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], passes: int) -> None:
        self._several = passes > 1
        self._model, self._batches = model, batches
        self._start: tuple[RandomState, Buffers] | None = None
        self._first: list[tuple[int, float, float]] = []  # digest of the batch, loss, its tolerance
        self._pass = self._batch = 0

    def rewind(self) -> None:
        """A pass begins: the same random numbers and buffers as in the first one."""
        self._pass, self._batch = self._pass + 1, 0
        if not self._several:
            return
        if self._start is None:
            self._start = (RandomState(self._model, self._batches), Buffers(self._model))
        else:
            for part in self._start:
                part.restore()

    def check(self, batch: Any, value: Tensor) -> None:
        """One batch and its loss."""
        if not self._several:
            return
        seen = (_digest(batch), value.item(), torch.finfo(value.dtype).eps ** 0.75)
        if self._pass == 1:
            self._first.append(seen)
        elif self._batch >= len(self._first):
            self._refuse(f"has more than the {len(self._first)} batches of the first")
        elif self._first[self._batch][0] != seen[0]:
            self._refuse(f"saw other data in batch {self._batch + 1}")
        elif abs(self._first[self._batch][1] - seen[1]) > seen[2] * abs(seen[1]) + 1e-8:
            self._refuse(
                f"has loss {seen[1]:g} in batch {self._batch + 1}, the first had {self._first[self._batch][1]:g}"
            )
        self._batch += 1

    def ended(self) -> None:
        """A pass is over."""
        if self._several and self._batch < len(self._first):
            self._refuse(f"has only {self._batch} batches, the first had {len(self._first)}")

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"passes over the data must be alike, but pass {self._pass} {what}. The global random generators and those "
            "of a DataLoader are set back for each pass; draw from them, pass a list of batches, or use memory='full'"
        )


def _digest(value: Any) -> int:
    """A checksum of the tensors and plain values in a batch."""
    if isinstance(value, Tensor):
        memory = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(memory.data, zlib.crc32(repr((value.dtype, tuple(value.shape))).encode()))
    if isinstance(value, numpy.ndarray):
        return _digest(torch.as_tensor(value)) if value.dtype != object else 0
    if isinstance(value, Mapping):
        return _joined([part for item in value.items() for part in item])
    if isinstance(value, (list, tuple)):
        return _joined(value)
    if dataclasses.is_dataclass(value):
        return _joined(list(vars(value).values()))
    return zlib.crc32(repr(value).encode()) if isinstance(value, (str, bytes, int, float, bool, type(None))) else 0


def _joined(parts: Sequence[Any]) -> int:
    return zlib.crc32(repr([_digest(part) for part in parts]).encode())
