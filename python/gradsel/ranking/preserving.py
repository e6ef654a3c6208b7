"""Running a model without leaving a trace: flags, gradients, modes, buffers and random numbers are restored."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores flags, gradients, modes, buffers and the global random number generators at the end.

    Gradients are enabled inside.
    """
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = Buffers(model)
    numbers = RandomState(model)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        buffers.restore()
        numbers.restore()


def eagerly() -> AbstractContextManager[Any]:
    """Inside, what torch.compile has compiled runs as it was written."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class Buffers:
    """A snapshot of the buffers of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the buffers back, in place."""
        for module, name, buffer, original in self._buffers:
            module._buffers[name] = buffer  # forward may have replaced it by another tensor
            if not torch.equal(buffer, original):
                buffer.copy_(original)


class RandomState:
    """A snapshot of the global random number generators of torch, Python and NumPy.

    Args:
        model: includes the generators of the CUDA devices that it is on.
        loader: a ``DataLoader``: includes its generator and those of its samplers.
    """

    def __init__(self, model: nn.Module, loader: Any = None) -> None:
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        self._torch = torch.get_rng_state()
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        self._python = random.getstate()
        self._numpy = numpy.random.get_state()
        self._loader = [(generator, generator.get_state()) for generator in _generators(loader)]

    def restore(self) -> None:
        """Resets all generators to the snapshot."""
        torch.set_rng_state(self._torch)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        for generator, state in self._loader:
            generator.set_state(state)


def _generators(loader: Any) -> Iterable[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for g in (getattr(holder, "generator", None) for holder in holders)}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]
