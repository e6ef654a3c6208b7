"""The kernel calls of MaskedAdam: what one call gets, worked out once and used for as long as it holds.

Finding weights, indices and states of 150 tensors takes longer than updating the entries of a small selection. So a
:class:`Plan` is kept for each parameter group, and at every step looks whether what it was made from is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsel.attached import links_of, owner_of
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, Place

State = dict[str, Any]
_DTYPE = attrgetter("dtype")
#: A place in the memory of a tensor: its address, shape and strides.
Memory = tuple[int, torch.Size, tuple[int, ...]]


class Route(NamedTuple):
    """How one parameter gets to the kernel.

    Attributes:
        parameter: what the optimizer holds.
        weight: what is written: the parameter itself, or the weight that it holds values of.
        mask: the selected entries of ``weight``.
        original: their values at attach(); None where the parameter is its own weight.
    """

    parameter: Tensor
    weight: Tensor
    mask: Mask
    original: Tensor | None

    @property
    def is_compact(self) -> bool:
        """The parameter holds the selected entries only, as do its gradient and moments."""
        return self.weight is not self.parameter


def route_of(parameter: Tensor, masks: Mapping[Tensor, Mask]) -> Route:
    """The route of a parameter. ``masks`` counts where it holds no values of an attached weight."""
    owner = owner_of(parameter)
    if owner is None:
        return Route(parameter, parameter, masks[parameter].to(parameter.device), None)
    weight, selected = owner
    return Route(parameter, weight, selected.mask, selected.original)


class Call:
    """The tensors of one call of ``masked_adam_``: those of a group on one device.

    Args:
        numbers: places of the routes' gradients among those of the group.
        routes: at least one entry is selected in each.
        states: complete states, see ``complete``.
        complete: brings the state of a route up to date: the master copy of a weight that others have written.
        versions: of the low-precision parameters as of the last step; kept up to date.
        seed: for rounding stochastically what has no master copy and is in low precision; None: to nearest.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        routes: Sequence[Route],
        states: Sequence[State],
        complete: Callable[[Route], State],
        versions: dict[Tensor, tuple[int, int]],
        seed: int | None,
    ) -> None:
        self.numbers = numbers
        self.routes = routes
        self.states = states
        self.device = routes[0].parameter.device
        self._complete = complete
        self._versions = versions
        places = [route.mask.place(route.weight) for route in routes]
        self.weights: list[Tensor | None] = [place.weight for place in places]
        self.indices = [place.indices for place in places]
        self.layouts = [place.layout for place in places]
        self.values = [route.parameter if route.is_compact else None for route in routes]
        #: Entries with more than two dimensions, or seen through an alias: it is good for one memory only.
        self.moving = [
            (j, route, _memory(route.weight))
            for j, (route, place) in enumerate(zip(routes, places, strict=True))
            if place.weight is not route.weight or route.weight.ndim > 2
        ]
        self.seeds = None if seed is None else list(map(self._seeds, numbers, routes, states, repeat(seed)))
        #: Whether any keeps what rounding left behind.
        self.compensated = any("compensation" in state for state in states)
        #: Entries whose gradients lie in mask order.
        self.compact = [j for j, route in enumerate(routes) if route.is_compact]
        #: Entries that train a master copy.
        self.rounded = [(j, route) for j, route in enumerate(routes) if "master" in states[j]]

    @staticmethod
    def _seeds(number: int, route: Route, state: State, seed: int) -> int | None:
        rounds = not route.is_compact and route.parameter.dtype != trained_dtype(route.parameter)
        return seed + number if rounds and "master" not in state else None

    def lists(self, grads: Sequence[Tensor | None], amsgrad: bool, anchored: bool) -> dict[str, Any]:
        """The arguments of ``masked_adam_`` that are lists.

        Args:
            grads: of all parameters of the group.
            amsgrad, anchored: whether the step needs running maxima, and originals.
        """
        mine: list[Any] = [grads[number] for number in self.numbers]
        self._follow(mine)
        for j in self.compact:
            mine[j] = mine[j].contiguous()
        states = self.states
        for j, route in self.rounded:
            if self._versions.get(route.parameter) != version_of(route.parameter):
                self._complete(route)
            self.values[j] = states[j]["master"]
        return {
            "weights": self.weights,
            "grads": mine,
            "exp_avgs": [state["exp_avg"] for state in states],
            "exp_avg_sqs": [state["exp_avg_sq"] for state in states],
            "steps": [state["step"] for state in states],
            "indices": self.indices,
            "layouts": self.layouts,
            "values": self.values,
            "max_exp_avg_sqs": [state["max_exp_avg_sq"] for state in states] if amsgrad else None,
            "originals": [state["original"] for state in states] if anchored else None,
            "seeds": self.seeds,
            "compensations": [state.get("compensation") for state in states] if self.compensated else None,
        }

    def done(self) -> None:
        """After the kernel has run."""
        for _, route in self.rounded:
            self._versions[route.parameter] = version_of(route.parameter)

    def _follow(self, grads: list[Tensor]) -> None:
        """Brings aliases up to date, and ``grads`` into the form that goes with them."""
        for number, (j, route, memory) in enumerate(self.moving):
            now = _memory(route.weight)
            if now != memory:
                self.weights[j], self.indices[j], self.layouts[j] = route.mask.place(route.weight)
                self.moving[number] = (j, route, now)
            if not route.is_compact:
                place = Place(self.weights[j], self.indices[j], self.layouts[j])  # type: ignore[arg-type]
                grads[j] = route.mask.grad_at(place, route.weight, grads[j])


class Plan:
    """The calls of one parameter group.

    Args:
        parameters: all of the group.
        grads: theirs.
        options: whatever else decides which tensors the calls take.
        calls: for the parameters with a gradient and a selected entry.
        states: the optimizer's, in which those of the calls are found.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        options: tuple,
        calls: Sequence[Call],
        states: dict[Tensor, State],
    ) -> None:
        self.calls = calls
        self._parameters = list(parameters)
        self._absent = [grad is None for grad in grads]
        self._options = options
        self._states = states
        self._dtypes = list(map(_DTYPE, parameters))
        self._found_states = [state for call in calls for state in call.states]
        links: list[tuple[dict, Any, Any]] = []
        for call in calls:
            for route, state in zip(call.routes, call.states, strict=True):
                links.append((states, route.parameter, state))
                links += links_of(route.parameter)
        self._dicts, self._keys, self._found = ([link[i] for link in links] for i in range(3))

    def holds(
        self,
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        options: tuple,
        states: dict[Tensor, State],
    ) -> bool:
        """Whether nothing but gradients, and the memory and contents of tensors, is new."""
        return (
            options == self._options
            and states is self._states
            and list(map(_DTYPE, parameters)) == self._dtypes
            and all(map(len, self._found_states))
            and len(parameters) == len(self._parameters)
            and all(map(is_, parameters, self._parameters))
            and [grad is None for grad in grads] == self._absent
            and all(map(is_, map(dict.get, self._dicts, self._keys), self._found))
            and all(call.routes[0].parameter.device == call.device for call in self.calls)
        )


def calls_by_device(
    routes: Iterable[tuple[int, Route]],
    complete: Callable[[Route], State],
    versions: dict[Tensor, tuple[int, int]],
    seed: int | None,
) -> list[Call]:
    """One call for each device that numbered routes are on; see :class:`Call`."""
    found: dict[torch.device, tuple[list[int], list[Route], list[State]]] = {}
    for number, route in routes:
        numbers, there, states = found.setdefault(route.parameter.device, ([], [], []))
        numbers.append(number)
        there.append(route)
        states.append(complete(route))
    return [Call(*parts, complete, versions, seed) for parts in found.values()]


def refuse_sparse(grads: Iterable[Tensor]) -> None:
    """Raises torch's RuntimeError if a gradient is sparse."""
    if any(grad.is_sparse for grad in grads):
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")


def version_of(parameter: Tensor) -> tuple[int, int]:
    """What changes when anybody writes a parameter, except in place through ``.data``."""
    return parameter._version, parameter.data_ptr()


def _memory(tensor: Tensor) -> Memory:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
