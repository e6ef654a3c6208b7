"""What a step of MaskedAdam does: every group's kernel calls, described once and repeated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import gradsel_kernels as gk
from gradsel.masks import Mask, Whole
from gradsel.optim import compiling
from gradsel.optim.call import Call, Plan, State, Target, calls_by_device, refuse_sparse, target_of, version_of
from gradsel.optim.completing import complete
from gradsel.optim.first_step import select_in_step
from gradsel.optim.groups import check_anchor, check_options, check_parameter, check_shape, replaced_by_hand
from gradsel.optim.rates import host_number, rates_on
from gradsel.optim.selector import Selector
from gradsel.selection.selection import Selection
from gradsel.sharding import is_sharded
from gradsel_kernels.adam_call import AdamOptions

#: Options of a group that decide which tensors its kernel calls take, so that a plan holds for their values only.
_DECIDING_OPTIONS = ("amsgrad", "capturable", "differentiable", "low_precision", "seed", "state_dtype")


def _hyperparameters(group: dict[str, Any]) -> AdamOptions:
    beta1, beta2 = group["betas"]
    capturable = group["capturable"]
    return AdamOptions(
        host_number(group["lr"], capturable),
        host_number(beta1, capturable),
        host_number(beta2, capturable),
        group["eps"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        group["maximize"],
        float(group["anchor"]),
        group["anchor_norm"] == 1,
        group["anchor_decoupled"],
    )


@contextmanager
def _as_plain_tensors() -> Iterator[None]:
    """Weights of attached models are read as they are, and nothing is differentiated."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        yield


class Stepping(Optimizer):
    """The base of :class:`gradsel.MaskedAdam`, which gives the attributes their values."""

    _selection: Selection | Mapping[str, Mask] | None
    _masks: dict[Tensor, Mask]
    _own_masks: dict[Tensor, Mask]  #: from groups with masks of their own
    #: Whether another selection was trained before this one, so that other entries have moved as well.
    has_reselected: bool = False
    #: Makes the selection, with ``policy``.
    _selector: Selector | None = None
    #: Versions and addresses of low-precision parameters after the last step of this optimizer.
    _versions: dict[Tensor, tuple[int, int]]
    _plans: dict[int, Plan]  #: by number of the group
    #: Another text once masks or states have been replaced: torch.compile compiles again when a text changes.
    _epoch: str = "0"
    _entries: dict[Tensor, Tensor]  #: for :mod:`gradsel.optim.compiling`

    def _is_watched(self) -> bool:
        """Whether a step has to announce itself: to hooks, a profiler or the compiler.

        To do so takes torch ten microseconds, also where nobody listens, which is as long as a small step takes.
        """
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.compiler.is_compiling()
            or _profiler_enabled()
        )

    def _plain_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    _watched_step = Optimizer.profile_hook_step(torch.no_grad()(_plain_step))

    def _update(self) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self._update_groups()
        elif self._selector is None or (self._selection is not None and self._selector.every is None):
            self._update_compiled()
        else:
            self._update_eagerly()

    def _update_compiled(self) -> None:
        """What torch.compile traces: one operator for each group, without a graph break."""
        with torch._C.DisableTorchFunctionSubclass():
            calls = []
            for number, group in enumerate(self.param_groups):
                check_anchor(group)
                anchored = True if group["anchor"] != 0 else False  # noqa: SIM210  # compiled anew if it changes
                into: tuple[list, ...] = tuple([] for _ in compiling.LISTS)
                devices = self._init_group(number, self._epoch, anchored, *into)
                if devices is None or devices > 1:
                    self._update_eagerly()
                    return
                if devices:
                    calls.append((group, into))
            for group, into in calls:
                device = into[0][0].device
                scaler = {name: self._from_scaler(name, device) for name in ("grad_scale", "found_inf")}
                compiling.step(group, into, scaler)

    @torch._disable_dynamo
    def _init_group(self, number: int, epoch: str, anchored: bool, *into: list) -> int | None:
        """Fills lists for :func:`compiling.step`. Not traced: see :mod:`gradsel.optim.compiling`.

        Args:
            number: of the group.
            epoch, anchored: what is compiled holds for these only.

        Returns:
            On how many devices there is something to do; None if there are DTensors, which are updated eagerly.
        """
        group = self.param_groups[number]
        with _as_plain_tensors():
            calls = self._calls(number, [parameter.grad for parameter in group["params"]])
            if any(is_sharded(target.weight) or target.is_sharded for call in calls for target in call.targets):
                return None
            for call in calls:
                compiling.fill(call, call.lists(group["amsgrad"], anchored), into, self._entries)
        return len(calls)

    @torch._disable_dynamo
    def _update_eagerly(self) -> None:
        """A graph break under torch.compile: plans check themselves."""
        self._update_groups()

    def _update_groups(self) -> None:
        done: frozenset[Tensor] | None = frozenset()
        if self._selector is not None:
            with _as_plain_tensors():
                done = select_in_step(self, self._selector)
        if done is None:
            return
        for number, group in enumerate(self.param_groups):
            check_anchor(group)
            plan = self._plans.pop(number, None)
            if plan is None or done or not self._repeat(plan, group):
                with _as_plain_tensors():
                    plan = self._update_anew(number, group, done)
            if plan is not None:
                self._plans[number] = plan

    def _repeat(self, plan: Plan, group: dict[str, Any]) -> bool:
        """Updates a group as in the last step; False if that is no longer possible, and then nothing has changed."""
        # Without it torch asks the subclass of an attached weight whenever C++ reads its version or gradient.
        with torch._C.DisableTorchFunctionSubclass():
            if not plan.holds(group, self.state):
                return False
            plan.run(_hyperparameters(group), self._from_scaler, partial(rates_on, group))
        return True

    def _update_anew(self, number: int, group: dict[str, Any], done: frozenset[Tensor]) -> Plan | None:
        """Updates a group without those that are done already. The plan is for the next step."""
        grads = [None if parameter in done else parameter.grad for parameter in group["params"]]
        calls = self._calls(number, grads)
        for call in calls:
            self._run(call, group)
        if done:  # the next step has more parameters to update
            return None
        return Plan(group, grads, calls, self.state, _DECIDING_OPTIONS)

    def _forget_calls(self) -> None:
        """To be called when masks or states have been replaced."""
        self._plans, self._entries = {}, {}
        self._epoch = str(int(self._epoch) + 1)

    def _run(self, call: Call, group: dict[str, Any]) -> None:
        scaler: dict[str, Any] = {name: self._from_scaler(name, call.device) for name in ("grad_scale", "found_inf")}
        lists = call.lists(group["amsgrad"], bool(group["anchor"]))
        rates = rates_on(group, call.device)
        gk.masked_adam_(**lists, **_hyperparameters(group)._asdict(), **scaler, rates=rates)
        call.done()

    def _from_scaler(self, name: str, device: torch.device) -> Tensor | None:
        """The scalar that a GradScaler has set for this step."""
        scalar: Tensor | None = getattr(self, name, None)
        return None if scalar is None else scalar.to(device, torch.float32)

    def _calls(self, number: int, grads: list[Tensor | None]) -> list[Call]:
        group = self.param_groups[number]
        check_options(group)
        targets = [
            (n, target) for n, target in enumerate(self._targets(group)) if grads[n] is not None and target.mask.nnz
        ]
        refuse_sparse(grads[n] for n, _ in targets)  # type: ignore[misc]
        for _, target in targets:
            check_parameter(target.parameter, group["capturable"])
            check_shape(target.mask, target.parameter)
        if self._selector is not None and self._selection is not None:
            self._selector.report_late(group, self._masks)
        seed = None
        if group["low_precision"] == "stochastic":  # a different one for each parameter, by its place in the optimizer
            seed = (group["seed"] << 32) + sum(len(earlier["params"]) for earlier in self.param_groups[:number])
        own = weakref.proxy(self)  # plans must not keep the optimizer, and with it the model, alive
        return calls_by_device(targets, lambda target: own._state(target, group), self._versions, seed)

    def _targets(self, group: dict[str, Any]) -> Iterator[Target]:
        for parameter in group["params"]:
            if parameter not in self._masks:
                if self._selection is not None or self._own_masks or self._selector is not None:
                    raise KeyError(replaced_by_hand(parameter))
                self._masks[parameter] = Whole(parameter.shape)
            yield target_of(parameter, self._masks)

    def _state(self, target: Target, group: dict[str, Any]) -> State:
        """The state of a parameter, complete and up to date."""
        parameter = target.parameter
        state: State = self.state[parameter]
        complete(state, target, group, self._versions.get(parameter) != version_of(parameter))
        return state
