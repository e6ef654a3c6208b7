"""Casting and moving an attached model: to(), half(), share_memory() and whatever else calls ``nn.Module._apply``.

Depending on global flags of torch and on the tensors, ``_apply`` writes to parameters, exchanges what is in them, or
puts new ones in their place, past all hooks. So that it does not matter which, weights and values are ordinary
parameters while they are converted. Afterwards they are what they were, and values have all their digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import LINK, Attachments, Selected, SelectedValues, is_values
from gradsel.attached.selected import uncast
from gradsel.dtypes import trained_dtype
from gradsel.nn.weights import SelectedWeight


@dataclass
class _Place:
    """Where a parameter is that is about to be converted.

    Attributes:
        own: the parameters of its module, by their names.
        key: its name.
        parameter: itself, before.
        entries: those of values; None for a weight.
    """

    own: dict[str, Any]
    key: str
    parameter: Tensor
    selected: Selected
    entries: Tensor | None


class Conversion:
    """``_apply`` of a module of an attached model, as an attribute of the module."""

    def __init__(self, attachments: Attachments) -> None:
        self.attachments = attachments

    def __call__(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        module, record = self.attachments.module(), self.attachments.record
        assert module is not None
        convert = type(module)._apply
        if record.converting:  # called for a module around this one
            return convert(module, fn, *args, **kwargs)
        if record.sharded:
            return self._of_shards(fn, convert, *args, **kwargs)
        places = list(_places_in(module))
        record.converting = True
        try:
            for place in places:
                vars(place.parameter).pop(LINK, None)
                place.parameter.__class__ = place.selected.kind if place.entries is None else nn.Parameter
            return convert(module, fn, *args, **kwargs)
        finally:
            record.converting = False
            _link(places)

    def _of_shards(self, fn: Callable[[Tensor], Tensor], convert: Callable, *args: Any, **kwargs: Any) -> nn.Module:
        """Of a model that FSDP has sharded: it may be moved, but not cast, since values would lose digits."""
        module, record = self.attachments.module(), self.attachments.record
        for name, selected in record.sharded.items():
            assert selected.shards is not None
            for tensor in selected.shards.both:
                probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                if fn(probe).dtype is not probe.dtype:
                    raise RuntimeError(
                        f"{name} is attached and sharded, so the model cannot be cast any more: cast it before "
                        "fully_shard() and attach()"
                    )
        converted = convert(module, fn, *args, **kwargs)
        for selected in record.sharded.values():
            assert selected.shards is not None
            for tensor in selected.shards.both:  # torch exchanges what is in them, their attributes included
                vars(tensor)[LINK] = selected
        return converted


def _places_in(root: nn.Module) -> Iterable[_Place]:
    for module in root.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or (selected := vars(parameter).get(LINK)) is None:
                continue
            if is_values(parameter):
                yield _Place(module._parameters, key, parameter, selected, parameter.detach())
            elif type(parameter) is SelectedWeight:
                with torch._C.DisableTorchFunctionSubclass():
                    selected.refresh(parameter)
                yield _Place(module._parameters, key, parameter, selected, None)


@torch.no_grad()
def _link(places: list[_Place]) -> None:
    """Makes weights and values of what has been converted."""
    made: dict[int, Tensor] = {}  # by the parameter before: what was shared stays shared
    for place in sorted(places, key=lambda place: place.entries is not None):  # weights first: values go by their dtype
        new = made.setdefault(id(place.parameter), place.own[place.key])
        place.own[place.key] = new
        for module, _ in place.selected.alive():
            for key, held in module._parameters.items():
                if held is place.parameter:
                    module._parameters[key] = new  # type: ignore[assignment]
        if place.entries is None:
            adopt_weight(new, place.selected)
        elif type(new) is not SelectedValues:
            if not new.is_meta and not place.entries.is_meta:
                grad, new.grad = new.grad, None
                new.data = uncast(new.data, place.entries)
                new.grad = None if grad is None else grad.to(new.dtype)
            adopt_values(new, place.selected, place.selected.weight())
    with torch._C.DisableTorchFunctionSubclass():
        for place in places:
            if place.entries is None:
                place.selected.refresh(place.own[place.key])


def adopt_weight(weight: Tensor, selected: Selected) -> None:
    """Makes a parameter the weight of a selection."""
    weight.requires_grad_(False)
    weight.__class__ = SelectedWeight
    vars(weight)[LINK] = selected
    with torch._C.DisableTorchFunctionSubclass():
        selected.follow(weight)


def adopt_values(values: Tensor, selected: Selected, weight: Tensor | None) -> None:
    """Makes a parameter the values of a weight."""
    values.__class__ = SelectedValues
    vars(values)[LINK] = selected
    dtype = trained_dtype(values if weight is None else weight)
    if values.dtype is not dtype:
        values.data = values.detach().to(dtype)
    selected.seen = None
