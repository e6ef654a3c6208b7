"""The kernel calls of MaskedAdam: their arguments are worked out once and reused while nothing has changed.

Finding weights, indices and states of 150 tensors takes longer than updating the entries of a small selection. So a
:class:`Plan` is kept for each parameter group, and every step checks whether the objects it was made from are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsel.attached import Selected, links_of, owner_of
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, Place

State = dict[str, Any]
_DTYPE = attrgetter("dtype")
#: A place in the memory of a tensor: its address, shape and strides.
Memory = tuple[int, torch.Size, tuple[int, ...]]


class Target(NamedTuple):
    """What the kernel gets for one parameter.

    Attributes:
        parameter: what the optimizer holds.
        weight: what is written: the parameter itself, or the weight that it holds values of.
        mask: the selected entries of ``weight``.
        selected: how the parameter's weight is attached; None where the parameter is its own weight.
    """

    parameter: Tensor
    weight: Tensor
    mask: Mask
    selected: Selected | None

    @property
    def is_compact(self) -> bool:
        """Whether the parameter holds the selected entries only, as its gradient and moments then do."""
        return self.weight is not self.parameter


def target_of(parameter: Tensor, masks: Mapping[Tensor, Mask]) -> Target:
    """The target of a parameter. Values of an attached weight know their mask; for others it is in ``masks``."""
    owner = owner_of(parameter)
    if owner is None:
        return Target(parameter, parameter, masks[parameter].to(parameter.device), None)
    weight, selected = owner
    return Target(parameter, weight, selected.mask, selected)


class Call:
    """The tensors of one call of ``masked_adam_``: those of a group on one device.

    Args:
        numbers: the position of each target's parameter in the group.
        targets: each with at least one selected entry.
        states: complete states, see ``complete``.
        complete: brings the state of a target up to date, such as the master copy of a weight that was written.
        versions: of the low-precision parameters after the last step; updated after every step.
        seed: for stochastic rounding of low-precision parameters without a master copy; None rounds to nearest.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        targets: Sequence[Target],
        states: Sequence[State],
        complete: Callable[[Target], State],
        versions: dict[Tensor, tuple[int, int]],
        seed: int | None,
    ) -> None:
        self.numbers = numbers
        self.targets = targets
        self.states = states
        self.device = targets[0].parameter.device
        self._complete = complete
        self._versions = versions
        places = [target.mask.place(target.weight) for target in targets]
        self.weights: list[Tensor | None] = [place.weight for place in places]
        self.indices = [place.indices for place in places]
        self.layouts = [place.layout for place in places]
        self.values = [target.parameter if target.is_compact else None for target in targets]
        #: Targets with more than two dimensions or with an alias for a weight, which depend on where the weight lies.
        self.moving = [
            (j, target, _memory(target.weight))
            for j, (target, place) in enumerate(zip(targets, places, strict=True))
            if place.weight is not target.weight or target.weight.ndim > 2
        ]
        self.seeds = None if seed is None else list(map(self._seeds, numbers, targets, states, repeat(seed)))
        #: Whether any state keeps rounding errors.
        self.compensated = any("compensation" in state for state in states)
        #: Targets whose gradients are in mask order.
        self.compact = [j for j, target in enumerate(targets) if target.is_compact]
        #: Targets that train a master copy.
        self.rounded = [(j, target) for j, target in enumerate(targets) if "master" in states[j]]

    @staticmethod
    def _seeds(number: int, target: Target, state: State, seed: int) -> int | None:
        rounds = not target.is_compact and target.parameter.dtype != trained_dtype(target.parameter)
        return seed + number if rounds and "master" not in state else None

    def lists(self, grads: Sequence[Tensor | None], amsgrad: bool, anchored: bool) -> dict[str, Any]:
        """The arguments of ``masked_adam_`` that are lists.

        Args:
            grads: of all parameters of the group.
            amsgrad, anchored: whether the step needs running maxima and originals, respectively.
        """
        mine: list[Any] = [grads[number] for number in self.numbers]
        for target in self.targets:
            if target.selected is not None:
                target.selected.refresh(target.weight)
        self._follow(mine)
        for j in self.compact:
            mine[j] = mine[j].contiguous()
        states = self.states
        for j, target in self.rounded:
            if self._versions.get(target.parameter) != version_of(target.parameter):
                self._complete(target)
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
        """Records what the kernel has written. To be called after it has run."""
        for target in self.targets:
            if target.selected is not None:
                target.selected.mark(target.weight, target.parameter)
        for _, target in self.rounded:
            self._versions[target.parameter] = version_of(target.parameter)

    def _follow(self, grads: list[Tensor]) -> None:
        """Updates aliases, and views ``grads`` in the same way."""
        for number, (j, target, memory) in enumerate(self.moving):
            now = _memory(target.weight)
            if now != memory:
                self.weights[j], self.indices[j], self.layouts[j] = target.mask.place(target.weight)
                self.moving[number] = (j, target, now)
            if not target.is_compact:
                place = Place(self.weights[j], self.indices[j], self.layouts[j])  # type: ignore[arg-type]
                grads[j] = target.mask.grad_at(place, target.weight, grads[j])


class Plan:
    """The calls of one parameter group.

    Args:
        parameters: all parameters of the group.
        grads: their gradients.
        options: the options that decide which tensors the calls take.
        calls: for the parameters with a gradient and a selected entry.
        states: all states of the optimizer.
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
            for target, state in zip(call.targets, call.states, strict=True):
                links.append((states, target.parameter, state))
                links += links_of(target.parameter)
        self._dicts, self._keys, self._found = ([link[i] for link in links] for i in range(3))

    def holds(
        self,
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        options: tuple,
        states: dict[Tensor, State],
    ) -> bool:
        """Whether nothing has changed except gradients and the memory and contents of tensors."""
        return (
            options == self._options
            and states is self._states
            and list(map(_DTYPE, parameters)) == self._dtypes
            and all(map(len, self._found_states))
            and len(parameters) == len(self._parameters)
            and all(map(is_, parameters, self._parameters))
            and [grad is None for grad in grads] == self._absent
            and self._links_hold()
            and all(call.targets[0].parameter.device == call.device for call in self.calls)
        )

    def _links_hold(self) -> bool:
        """Whether every dictionary entry that was read still is the same object."""
        return all(map(is_, map(dict.get, self._dicts, self._keys), self._found))


def calls_by_device(
    targets: Iterable[tuple[int, Target]],
    complete: Callable[[Target], State],
    versions: dict[Tensor, tuple[int, int]],
    seed: int | None,
) -> list[Call]:
    """One call for each device that numbered targets are on; see :class:`Call`."""
    found: dict[torch.device, tuple[list[int], list[Target], list[State]]] = {}
    for number, target in targets:
        numbers, there, states = found.setdefault(target.parameter.device, ([], [], []))
        numbers.append(number)
        there.append(target)
        states.append(complete(target))
    return [Call(*parts, complete, versions, seed) for parts in found.values()]


def refuse_sparse(grads: Iterable[Tensor]) -> None:
    """Raises torch's RuntimeError if a gradient is sparse."""
    if any(grad.is_sparse for grad in grads):
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")


def version_of(parameter: Tensor) -> tuple[int, int]:
    """Changes with every write to a parameter, except in place through ``.data``."""
    return parameter._version, parameter.data_ptr()


def _memory(tensor: Tensor) -> Memory:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
