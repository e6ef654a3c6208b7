"""Buffers of an attached model: training changes them by the way (running statistics), and detach() takes that back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.parameters.names import strip_wrappers
from gradsel.quantised import keeps_elsewhere

#: The attribute of the module that attach() was called on, with its buffers at that time.
BUFFERS = "_gradsel_buffers"


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that checkpoints contain, by name without the prefixes of wrappers, but for quantised weights."""
    return {strip_wrappers(name): tensor for name, tensor in _saved(model)}


def keep_buffers(root: nn.Module) -> None:
    """Copies the buffers of a model that is being attached."""
    vars(root)[BUFFERS] = {name: tensor.detach().clone() for name, tensor in saved_buffers(root).items()}


def kept_buffers(root: nn.Module) -> dict[str, Tensor]:
    """The buffers at attach(), by the names at that time, as far as they have their places and shapes in the model."""
    now = saved_buffers(root)
    kept: dict[str, Tensor] = vars(root).get(BUFFERS, {})
    return {name: tensor for name, tensor in kept.items() if name in now and now[name].shape == tensor.shape}


@torch.no_grad()
def restore_buffers(root: nn.Module) -> None:
    """Gives buffers the contents that they had at attach()."""
    now = saved_buffers(root)
    for name, tensor in kept_buffers(root).items():
        now[name].copy_(tensor)


def begin_with(root: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Makes the buffers of a checkpoint of the plain model those to which detach() returns."""
    for name, tensor in kept_buffers(root).items():
        given = state_dict.get(prefix + name)
        if isinstance(given, Tensor) and given.shape == tensor.shape and not given.is_meta:
            vars(root)[BUFFERS][name] = given.detach().to(tensor.device, tensor.dtype, copy=True)


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if keeps_elsewhere(module):
            continue
        for short, tensor in module._buffers.items():
            if tensor is not None and short not in module._non_persistent_buffers_set:
                yield (f"{path}.{short}" if path else short), tensor
