"""Selecting at weights that have been trained for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradsel.delta.delta import Delta
from gradsel.nn.attaching import attach
from gradsel.nn.detaching import detach
from gradsel.selection.selection import Selection


@contextmanager
def trained(
    model: nn.Module,
    selection: Selection,
    epochs: int,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    optimizer_of: Callable[[nn.Module], Optimizer],
) -> Iterator[None]:
    """Inside, the model has been trained by a selection for some epochs; afterwards it is what it was, to the bit.

    Args:
        model: plain; trained in the caller's mode.
        batches: iterated over once for each epoch.
        loss: ``loss(model, batch)``.
        optimizer_of: makes the optimizer of the attached model.
    """
    attach(model, selection)
    try:
        optimizer = optimizer_of(model)
        for _ in range(epochs):
            for batch in batches:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
        delta = Delta.of(model, selection=selection)
    finally:
        detach(model, restore=True)
    with delta.applied(model):
        yield
