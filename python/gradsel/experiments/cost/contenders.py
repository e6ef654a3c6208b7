"""What all methods that fine-tune a model have in common, and the entries of a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsel.nn import trainable_parameters
from gradsel.ranking import select
from gradsel.selection import Selection

Batch = tuple[Tensor, Tensor]  # inputs and targets
Loss = Callable[[Any, Batch], Tensor]
Row = dict[str, Any]  # a line of the results
RATE = 1e-5  # the same for all; so low that a method in its last round does the same work as in its first


@dataclass
class Contender:
    """A model that is ready to be trained by one method.

    Attributes:
        after_backward: runs before the optimizer.
        autocast: the dtype of autocast in forward; None: off.
        merge: makes the model that is served, in place or not; None: there is nothing to merge.
        selection: of the methods that have one.
    """

    model: nn.Module
    loss: Loss
    optimizer: Optimizer | None = None
    after_backward: Callable[[], None] | None = None
    autocast: torch.dtype | None = None
    merge: Callable[[nn.Module], nn.Module] | None = None
    selection: Selection | None = None

    def precision(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)

    def step(self, batch: Batch) -> Tensor:
        """One training step. Returns the loss before it, still on the device, so that nothing waits for it."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            loss = self.loss(self.model, batch)
        loss.backward()
        if self.after_backward is not None:
            self.after_backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()

    def predict(self, inputs: Tensor) -> Tensor:
        with torch.inference_mode(), self.precision():
            return self.model(inputs)

    @property
    def trained(self) -> int:
        if self.selection is not None:
            return self.selection.trainable_count()
        if self.optimizer is None:
            return 0
        return sum(parameter.numel() for parameter in trainable_parameters(self.model))

    def facts(self) -> dict[str, Any]:
        """What the results say about it besides times and bytes."""
        found: dict[str, Any] = {"trained": self.trained}
        if self.selection is not None:
            masks: list[Any] = [mask for mask in self.selection.values() if mask.nnz and not mask.is_whole]
            shares = [100 * mask.used_columns().numel() / mask.rows_and_columns[1] for mask in masks]
            found["used_columns_percent"] = f"{sum(shares) / len(shares):.1f}"
        return found


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        k: entries, rows, columns or rank; 0 where there is no such number.
        build: makes a contender of a model that nobody else uses.
        served: names of the rows of inference, as trained and merged; None: not measured.
        note: remarks on its setting.
    """

    name: str
    k: int
    build: Callable[[nn.Module], Contender]
    served: tuple[str | None, str | None] = (None, None)
    note: str = ""


class Selections:
    """The selections of one model, each made when it is first needed and kept on the CPU.

    Args:
        batches: the data that gradients are taken on.
        freeze: names of parameters that no selection trains.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: Loss, freeze: Sequence[str] = ()) -> None:
        self._model, self._batches, self._loss, self._freeze = model, batches, loss, tuple(freeze)
        self._made: dict[tuple[str, str], Selection] = {}

    def __call__(self, device: torch.device, policy: Any, criterion: str = "gradient") -> Selection:
        key = str(policy), criterion
        if key not in self._made:
            found = select(
                self._model, self._batches, self._loss, policy, criterion, freeze=self._freeze, progress=False
            )
            self._made[key] = on(found, torch.device("cpu"))
        return on(self._made[key], device)


def on(selection: Selection, device: torch.device) -> Selection:
    """A selection with its masks on a device."""
    return Selection({name: mask.to(device) for name, mask in selection.items()}, selection.notes)


@dataclass(frozen=True)
class Task:
    """What methods need to know about a model.

    Attributes:
        layers: regular expression of the linear layers that adapters go to.
        head: the output layer, which every method trains; None: there is none to train.
        entrances: the first trained layers; the gradient has to reach their outputs.
        select: a policy's selection, on a device.
        regular_blocks: the last blocks that GRFT pulls to the pre-trained weights.
    """

    loss: Loss
    layers: str
    head: str | None
    entrances: tuple[str, ...]
    select: Callable[..., Selection]
    regular_blocks: int = 2


# --- Entries of a comparison -------------------------------------------------------------------------------------


@dataclass
class Running:
    """An entry at work: what is timed, and what the results say about it."""

    run: Callable[[], object]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A row of the results. ``start`` puts everything that it needs on the device."""

    name: str
    k: int
    start: Callable[[], Running]

    @property
    def key(self) -> Row:
        return {"k": self.k, "method": self.name}


def training(method: Method, make: Callable[[], nn.Module], batch: Batch, note: Callable[[], str] = str) -> Entry:
    """Steps on one batch; ``note`` says what is special about selections on this model."""

    def start() -> Running:
        contender = method.build(make())
        notes = [method.note, "" if contender.selection is None else note()]
        return Running(lambda: contender.step(batch), contender.facts() | {"note": ", ".join(filter(None, notes))})

    return Entry(method.name, method.k, start)


def inference(method: Method, make: Callable[[], nn.Module], inputs: Tensor) -> list[Entry]:
    """Forward passes of the model as it was trained and, if that is a different one, merged."""

    def entry(name: str, merged: bool) -> Entry:
        def start() -> Running:
            contender = method.build(make())
            contender.optimizer = contender.selection = None
            if merged and contender.merge is not None:
                contender.model, contender.autocast = contender.merge(contender.model), None
            contender.model.eval()
            return Running(lambda: contender.predict(inputs), {"note": "under autocast" if contender.autocast else ""})

        return Entry(name, method.k, start)

    return [entry(name, bool(merged)) for merged, name in enumerate(method.served) if name is not None]
