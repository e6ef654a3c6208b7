"""Collecting the gradients that a selection ranks, according to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsel.dtypes import trained_dtype
from gradsel.ranking.distributed import add_over, failing_together, total_over, unsynchronised
from gradsel.ranking.planning import NOT_ONE, GradientPlan
from gradsel.ranking.preserving import eagerly
from gradsel.ranking.replay import Replay
from gradsel.ranking.shards import shard_of
from gradsel.sharding import is_sharded

#: ``loss(model, batch)``
Loss = Callable[[Any, Any], Tensor]
#: Receives the name of a parameter and its gradient, summed over all batches.
Deliver = Callable[[str, Tensor], None]


@dataclass
class Collected:
    """What :func:`collect` saw.

    Attributes:
        batches: number of batches over all ranks.
        names: the parameters that got a gradient.
    """

    batches: int = 0
    names: set[str] = field(default_factory=set)


def collect(
    model: nn.Module,
    ranked: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Loss,
    plan: GradientPlan,
    deliver: Deliver,
    *,
    each_batch: Callable[[Tensor], Tensor] | None,
    loss_scale: float,
    group: dist.ProcessGroup | None,
    quiet: bool | None,
) -> Collected:
    """Sums the gradients of ``ranked`` over ``batches`` and delivers each sum once.

    Changes the model's flags and gradients, so call it inside :func:`gradsel.ranking.preserving.preserved`. Sums are
    float32 (float64 for float64 parameters) and add batches in order.

    Raises:
        ValueError: there are no batches; a loss is not a finite scalar or does not depend on the parameters; or passes
            differ.
    """
    result = Collected()
    replay = Replay(model, batches, len(plan.groups))
    # Compiled code would be made anew for each pass, since other parameters require grad.
    running = eagerly if len(plan.groups) > 1 else nullcontext
    # Backward of a sharded model communicates, so all ranks have to know before it whether it is run.
    agreeing = any(map(is_sharded, ranked.values()))
    for number, names in enumerate(plan.groups):
        for parameter in (*model.parameters(), *ranked.values()):  # stand-ins are not in the model
            parameter.requires_grad_(False)
            parameter.grad = None
        members = {name: ranked[name].requires_grad_(True) for name in names}
        sums = _Sums(each_batch, loss_scale, plan.offload, deliver if plan.streaming else None)
        title = "selection gradients" + (f", pass {number + 1} of {len(plan.groups)}" if len(plan.groups) > 1 else "")
        replay.rewind()
        count = 0
        with failing_together(group), sums.watching(members), unsynchronised(model), running():
            for batch in tqdm(batches, desc=title, unit="batch", disable=quiet, leave=False):
                count += 1
                if plan.streaming and count > 1:
                    raise ValueError(NOT_ONE)
                returned = loss(model, batch)
                with failing_together(group if agreeing else None):
                    value = _checked_loss(returned, count)
                    replay.check(batch, value)
                if value.requires_grad:
                    sums.backward(value)
                elif len(plan.groups) == 1:
                    raise ValueError(f"{_NEEDED}, got a tensor {list(value.shape)} without a gradient")
            replay.ended()
        result.batches = total_over(count, group, next(iter(members.values())).device)
        if result.batches == 0:
            raise ValueError("batches is empty, so there are no gradients; pass at least one batch")
        result.names |= sums.delivered
        if group is not None:
            add_over(sums.totals, members, group)
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
        raise ValueError(f"the selection loss of batch {number} is {value.item()}, so its gradients are meaningless")
    return value


class _Sums:
    """Takes each gradient from its parameter as soon as backward has computed it."""

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
        self._deliver = deliver  # when streaming: there is nothing to sum
        self._arrived: set[str] = set()
        self._running = False
        self.delivered: set[str] = set()
        self.totals: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, members: Mapping[str, Tensor]) -> Iterator[None]:
        """Takes the gradients of these parameters inside a ``with`` block."""
        foreign = [name for name, parameter in members.items() if parameter._post_accumulate_grad_hooks]
        if foreign:
            raise ValueError(
                f"{foreign[0]} has a hook of its own that acts on gradients as they arrive, such as an optimizer in "
                "backward; remove it, select, and register it again. If it is DeepSpeed's, select before "
                "deepspeed.initialize()"
            )
        with ExitStack() as stack:
            for name, parameter in members.items():
                handle = parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p))
                stack.callback(handle.remove)
            yield

    def backward(self, value: Tensor) -> None:
        """Runs backward from the loss of one batch."""
        self._arrived.clear()
        self._running = True
        try:
            (value * self._loss_scale).backward()
        finally:
            self._running = False

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        if not self._running:
            raise ValueError("loss must not call backward() itself; return the loss, and select() differentiates it")
        if name in self._arrived and (self._each_batch is not None or self._deliver is not None):
            raise ValueError(
                f"the gradient of {name} arrives in parts, of which only the sum is meaningful, because segments under "
                "reentrant checkpointing share the weight; use use_reentrant=False"
            )
        self._arrived.add(name)
        grad = shard_of(grad, parameter) if is_sharded(parameter) else grad
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
