"""The kernel calls of MaskedAdam: their arguments are worked out once and reused while nothing has changed.

Finding weights, indices and states of 150 tensors takes longer than updating the entries of a small selection. So after
a step, a :class:`Plan` of each parameter group is kept, and the next step asks it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsel.attached import VALUES_VERSION, WEIGHT_VERSION, Selected, links_of, owner_of
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, Whole
from gradsel.sharding import is_sharded, local_of, placed_like
from gradsel_kernels.adam_call import AdamOptions
from gradsel_kernels.adam_repeat import RepeatedAdam, Source, Written, can_repeat

State = dict[str, Any]
#: Entries of dicts by which something was found: (dict, key, object).
Links = list[tuple[dict, Any, Any]]


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

    @property
    def here(self) -> Target:
        """What this rank updates: its shards, or everything if the parameter is no DTensor.

        Values whose weight is not sharded alike are updated alone, and written to it afterwards.
        """
        shards = None if self.selected is None else self.selected.shards
        parameter = local_of(self.parameter).detach() if self.is_sharded else self.parameter
        if shards is not None and shards.aligned:
            return Target(parameter, local_of(self.weight), shards.share.mask, None)
        if not self.is_sharded and shards is None:
            return self
        return Target(parameter, parameter, Whole(parameter.shape), None)

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.parameter)


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
        self.targets = targets
        self.states = states
        self.device = targets[0].parameter.device
        self._complete = complete
        self._versions = versions
        self._seeds = None if seed is None else list(map(self._seed_of, numbers, targets, states, repeat(seed)))
        #: Targets that train a master copy.
        self._rounded = [j for j, state in enumerate(states) if "master" in state]

    @staticmethod
    def _seed_of(number: int, target: Target, state: State, seed: int) -> int | None:
        rounds = not target.is_compact and target.parameter.dtype != trained_dtype(target.parameter)
        return seed + number if rounds and "master" not in state else None

    def lists(self, amsgrad: bool, anchored: bool) -> dict[str, Any]:
        """The arguments of ``masked_adam_`` that are lists.

        Args:
            amsgrad, anchored: whether the step needs running maxima and originals, respectively.
        """
        for target in self.targets:
            if target.selected is not None:
                refresh(target)
        self._here = [target.here for target in self.targets]
        self._places = [target.mask.place(target.weight) for target in self._here]
        values: list[Tensor | None] = [target.parameter if target.is_compact else None for target in self._here]
        for j in self._rounded:
            target = self.targets[j]
            if self._versions.get(target.parameter) != version_of(target.parameter):
                self._complete(target)
            values[j] = local_of(self.states[j]["master"])
        states = [_local_state(s) if t.is_sharded else s for t, s in zip(self.targets, self.states, strict=True)]
        self._grads = [self._grad(j, target.parameter.grad) for j, target in enumerate(self.targets)]
        compensated = any("compensation" in state for state in states)
        self._lists = {
            "weights": [place.weight for place in self._places],
            "grads": self._grads,
            "exp_avgs": [state["exp_avg"] for state in states],
            "exp_avg_sqs": [state["exp_avg_sq"] for state in states],
            "steps": [state["step"] for state in states],
            "indices": [place.indices for place in self._places],
            "layouts": [place.layout for place in self._places],
            "values": values,
            "max_exp_avg_sqs": [state["max_exp_avg_sq"] for state in states] if amsgrad else None,
            "originals": [state["original"] for state in states] if anchored else None,
            "seeds": self._seeds,
            "compensations": [state.get("compensation") for state in states] if compensated else None,
        }
        return self._lists

    def _grad(self, j: int, grad: Any) -> Tensor:
        """The gradient of a target in the form that the kernel takes."""
        target, place = self._here[j], self._places[j]
        grad = local_of(placed_like(grad, self.targets[j].parameter))
        if target.is_compact:
            return grad.contiguous()
        if place.weight is target.weight and target.weight.ndim <= 2:
            return grad
        return target.mask.grad_at(place, target.weight, grad)

    def done(self) -> None:
        """Records what the kernel has written. To be called after it has run."""
        for target in self.targets:
            if target.selected is not None:
                done(target)
        for j in self._rounded:
            parameter = self.targets[j].parameter
            self._versions[parameter] = version_of(parameter)

    def repeated(self, more: Links, fixed: Sequence[list], without_grad: Sequence[Tensor]) -> RepeatedAdam | None:
        """The call for later steps with the same tensors; None if it has to be made anew in every step.

        To be called after :meth:`done`.

        Args:
            more: links besides those by which targets and states are found; see :class:`RepeatedAdam`.
            fixed, without_grad: likewise.
        """
        if any(target is not here for target, here in zip(self.targets, self._here, strict=True)):
            return None  # shards are found anew in every step
        sources, links, written = [], list(more), []
        for j, (target, state) in enumerate(zip(self.targets, self.states, strict=True)):
            parameter, selected = target.parameter, target.selected
            grad = parameter.grad
            assert grad is not None
            viewed: Tensor = self._grads[j]
            is_view = viewed is grad or viewed.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr()
            sources.append(Source(parameter, None if is_view else partial(self._grad, j)))
            links += links_of(parameter)
            links += [(state, key, tensor) for key, tensor in state.items() if isinstance(tensor, Tensor)]
            if selected is not None:
                links.append((vars(selected), "seen", selected.seen))
                written.append(Written(parameter, selected.seen, VALUES_VERSION))
                written.append(Written(target.weight, selected.seen, WEIGHT_VERSION))
            else:
                written.append(Written(target.weight, self._versions if j in self._rounded else None))
        lists, self._lists, self._grads = self._lists, {}, []  # gradients must not live on
        try:
            return RepeatedAdam(lists, sources, links, fixed, without_grad, written)
        except (TypeError, ValueError, RuntimeError):  # tensors of inference mode have no versions, for example
            return None


class Plan:
    """The calls of one parameter group, for as long as it trains the same tensors in the same way.

    Args:
        group: the parameter group.
        grads: of its parameters.
        calls: as they have just been made.
        states: all states of the optimizer.
        deciding: the options of the group that decide which tensors the calls take.
    """

    def __init__(
        self,
        group: dict[str, Any],
        grads: Sequence[Tensor | None],
        calls: Sequence[Call],
        states: dict[Tensor, State],
        deciding: Sequence[str],
    ) -> None:
        self._states = states
        self._anchored = bool(group["anchor"])
        links: Links = [(group, key, group[key]) for key in ("params", *deciding)]
        links += [
            (states, target.parameter, state) for c in calls for target, state in zip(c.targets, c.states, strict=True)
        ]
        without_grad = [p for p, grad in zip(group["params"], grads, strict=True) if grad is None]
        repeated = [
            call.repeated(*((links, [group["params"]], without_grad) if call is calls[0] else ([], [], [])))
            for call in calls
        ]
        self._repeated = [each for each in repeated if each is not None]
        self._is_whole = len(self._repeated) == len(calls) > 0

    def holds(self, group: dict[str, Any], states: dict[Tensor, State]) -> bool:
        """Whether the next step is the same calls, with other gradients and hyperparameters."""
        return (
            self._is_whole
            and states is self._states
            and bool(group["anchor"]) == self._anchored
            and all(can_repeat(each.device) and each.holds() for each in self._repeated)
        )

    def run(
        self,
        options: AdamOptions,
        scalar: Callable[[str, torch.device], Tensor | None],
        rates: Callable[[torch.device], Tensor | None],
    ) -> None:
        """Makes the calls; only after :meth:`holds`.

        Args:
            options: the hyperparameters.
            scalar: finds what a gradient scaler has set, by name, on a device.
            rates: finds the hyperparameters that stay on a device.
        """
        for each in self._repeated:
            each.run(options, scalar("grad_scale", each.device), scalar("found_inf", each.device), rates(each.device))


def refresh(target: Target) -> None:
    """Makes values and weight of an attached target agree before a step."""
    assert target.selected is not None
    if target.selected.shards is None:
        target.selected.refresh(target.weight)
    else:
        target.selected.shards.refresh()


def done(target: Target) -> None:
    """Records that a step has written values and weight of an attached target; completes it where it could not."""
    assert target.selected is not None
    shards = target.selected.shards
    if shards is None:
        target.selected.mark(target.weight, target.parameter)
    elif shards.aligned:
        shards.mark()
    else:
        shards.write()


def _local_state(state: State) -> State:
    return {key: local_of(value) if isinstance(value, Tensor) else value for key, value in state.items()}


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
    held = local_of(parameter)
    version = parameter._version if held is parameter else parameter._version + held._version
    return version, held.data_ptr()
