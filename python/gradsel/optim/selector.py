"""A selection that an optimizer makes by itself, from the gradients that it is given."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsel.attached import is_attached
from gradsel.dtypes import trained_dtype
from gradsel.masks import Frozen, Mask, fingerprint, from_parts
from gradsel.optim.groups import names_of
from gradsel.parameters import fingerprints as weights
from gradsel.parameters.names import shaped_parameters, strip_wrappers
from gradsel.parameters.rules import Rule, RuleOptions, parameter_rules
from gradsel.parameters.trainable import has_memory
from gradsel.quantised import StandIn
from gradsel.ranking.criteria import Criterion, Score, criterion_of
from gradsel.ranking.policies import PerNeuron, Policy
from gradsel.ranking.selecting import Ranker, report_missing, require_ranked, require_uneven, unranked
from gradsel.selection.selection import Selection
from gradsel.sharding import is_sharded
from gradsel_kernels._warnings import user_stacklevel

#: Why a parameter was left out that could have been selected.
NOT_GIVEN, NOT_TRAINABLE = "not in the optimizer", "requires_grad is False"


class Selector:
    """Ranks the gradients of an optimizer's parameters as :func:`gradsel.select` ranks those of a data set.

    Args:
        model: whose parameters the optimizer trains. It is only read here, not kept.
        policy: how many entries are trained, and which compete.
        criterion: as in :func:`gradsel.select`; a batch is what one step is done with.
        rules: keyword arguments of :func:`gradsel.parameters.rules.parameter_rules`.
        after: number of steps whose gradients are added up before they are ranked.
        every: number of steps after which the selection is made again; None: never.

    Raises:
        TypeError, ValueError: an argument out of range; rules that do not fit the model; the model is attached.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        criterion: str | Criterion | Score,
        rules: RuleOptions | None,
        after: int,
        every: int | None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a policy such as PerNeuron(1), got {policy!r}")
        _check_steps("select_after", after, 1)
        if every is not None:
            _check_steps("reselect_every", every, after)
        if is_attached(model):
            raise ValueError(
                "the model is attached, so it has a selection; leave out policy, or call gradsel.detach(model)"
            )
        require_uneven(policy, criterion_of(criterion))
        parameters = shaped_parameters(model)
        self.policy, self._given, self.criterion = policy, criterion, criterion_of(criterion)
        self.rules: dict[str, Rule] = parameter_rules(model, **(rules or {}))
        require_ranked(self.rules, parameters)
        if all(rule.action == "freeze" for rule in self.rules.values()):
            raise ValueError("nothing would be trained: the rules leave no parameter to rank or to train whole")
        _require_gradients(self.rules, parameters)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.after, self.every = after, every
        #: Steps since the last selection, or since the start if there is none.
        self.steps = 0
        self._sums: dict[str, Tensor] = {}
        self._reported: set[str] = set()
        self._waits = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "criterion": None}  # a criterion holds functions, which cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, criterion=criterion_of(state["_given"]))

    @property
    def ranks_as_they_are(self) -> bool:
        """Whether the gradients of one step are ranked row by row, so that one kernel can select and update."""
        policy = self.policy
        row_by_row = type(policy) is PerNeuron and policy.columns is None
        return row_by_row and isinstance(self._given, str) and self._given == "gradient" and self.after == 1

    def check(self, names: list[str], parameters: list[Tensor]) -> None:
        """Refuses parameters that the model does not have, and DTensors, of which a rank has no whole gradient."""
        for name, parameter in zip(names, parameters, strict=True):
            if is_sharded(parameter):
                raise ValueError(
                    f"{name} is a DTensor, in which policy= cannot select: call gradsel.select(model, ...), then "
                    "gradsel.attach(model, selection), and leave out policy"
                )
            if self.shapes.get(name) != tuple(parameter.shape):
                found = list(self.shapes[name]) if name in self.shapes else "no such parameter"
                raise ValueError(
                    f"the optimizer is given {name} {list(parameter.shape)}, but the model has {found}; "
                    "pass the named_parameters() of the model that policy= selects in"
                )

    def reads_gradients(self, selected: bool) -> bool:
        """Whether the gradients of the next step are ranked, alone or with others."""
        return self.criterion.needs_gradient and self.steps + 1 > self._steps(selected) - self.after

    def _steps(self, selected: bool) -> int:
        return self.after if not selected else (self.every or 0)

    def is_due(self, selected: bool, grads: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Counts a step, adds its gradients if they are to be ranked, and says whether the selection is due.

        Args:
            selected: there is a selection already.
            grads: the gradients of ranked parameters, by name.
        """
        steps = self._steps(selected)
        if self.after > 1 and self.steps + 1 > steps - self.after:
            self._add(grads())
        self.steps += 1
        return self.steps >= steps

    def _add(self, grads: Mapping[str, Tensor]) -> None:
        for name, grad in grads.items():
            added = grad.detach().to(trained_dtype(grad), copy=True)
            if self.criterion.each_batch is not None:
                added = self.criterion.each_batch(added)
            self._sums[name] = self._sums[name].add_(added) if name in self._sums else added

    def choose(
        self,
        parameters: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        given: Mapping[str, Mask],
        base: dict[str, str],
    ) -> Selection:
        """The selection by the gradients that were added, or by those of this step if one step is enough.

        Args:
            parameters: those of the optimizer, by name.
            grads: of the ranked ones.
            given: masks that have been chosen already.
            base: fingerprints of the weights, from :func:`fingerprints_of`.
        """
        self.criterion.reset()
        each_batch = self.criterion.each_batch
        if self.after > 1:
            ranked_by = self._sums
        elif each_batch is not None:
            ranked_by = {
                name: each_batch(grad.detach().to(trained_dtype(grad), copy=True)) for name, grad in grads.items()
            }
        else:
            ranked_by = dict(grads)
        wanted = {
            name: parameter
            for name, parameter in parameters.items()
            if self.rules[name].action == "rank" and parameter.requires_grad and name not in given
        }
        missing = [name for name in wanted if self.criterion.needs_gradient and name not in ranked_by]
        report_missing(missing, self.rules)
        ranked = {name: parameter for name, parameter in wanted.items() if name not in missing}
        rules = {name: rule for name, rule in self.rules.items() if rule.action != "rank" or name in ranked}
        ranker = Ranker(self.policy, self.criterion, rules, ranked, 1.0)  # type: ignore[arg-type]
        for name in ranked:
            ranker.add(name, ranked_by[name] if self.criterion.needs_gradient else None)
        notes = {"policy": str(self.policy), "criterion": self.criterion.name, "steps": self.after, **ranker.report()}
        found = {**given, **ranker.masks()}
        if wanted and not any(mask.nnz for mask in found.values()):
            raise ValueError(f"{self.policy} selects nothing of the ranked parameters; ask for more entries")
        masks: dict[str, Mask] = {}
        for name, shape in self.shapes.items():
            if name in found:
                masks[name] = found[name]
            elif name not in parameters:
                masks[name] = Frozen(shape, NOT_GIVEN)
            elif not parameters[name].requires_grad:
                masks[name] = Frozen(shape, NOT_TRAINABLE)
            else:
                masks[name] = unranked(self.rules[name], shape)
        return Selection(masks, notes, base)

    def report_waiting(self, ranked: list[Tensor]) -> None:
        """Warns, once, that none of the ranked parameters in the optimizer can be ranked yet."""
        if not ranked or self._waits:
            return
        self._waits = True
        frozen = sum(not parameter.requires_grad for parameter in ranked)
        warnings.warn(
            f"none of the {len(ranked)} ranked parameters has a gradient other than zero ({frozen} have requires_grad "
            "False): until one has, nothing is selected, and only parameters that are trained whole change",
            stacklevel=user_stacklevel(),
        )

    def report_late(self, group: Mapping[str, Any], masks: Mapping[Tensor, Mask]) -> None:
        """Warns, once, of parameters that have gradients, but were not in the optimizer or frozen when it selected."""
        late = [
            name
            for name, parameter in zip(map(strip_wrappers, names_of(group) or ()), group["params"], strict=False)
            if parameter.grad is not None
            and masks[parameter].label in (NOT_GIVEN, NOT_TRAINABLE)
            and self.rules[name].action != "freeze"
            and name not in self._reported
        ]
        if not late or self.every is not None:  # then they are ranked next time
            return
        self._reported.update(late)
        warnings.warn(
            f"{len(late)} parameters have gradients but are not trained, first {late[0]}: when the optimizer selected, "
            "they were not in it, or did not require gradients. Call optimizer.reselect() with a selection that has "
            "them, or make the optimizer when they are to be trained",
            stacklevel=user_stacklevel(),
        )

    def chosen(self) -> None:
        """Starts to count anew, once a selection is in use."""
        self.steps, self._sums = 0, {}

    def failed(self, selected: bool) -> None:
        """Drops gradients that could not be ranked."""
        self.steps, self._sums = (self.every or 0) - self.after if selected else 0, {}

    def saved(self, selection: Mapping[str, Mask] | None) -> dict[str, Any]:
        """What a state_dict holds, in types that ``torch.load(weights_only=True)`` reads."""
        found: dict[str, Any] | None = None
        if selection is not None:
            masks = {
                name: {"kind": m.kind, "shape": list(m.shape), "description": m.describe(), "tensors": m.packed()}
                for name, m in selection.items()
            }
            known = selection if isinstance(selection, Selection) else Selection(selection)
            found = {"masks": masks, "notes": dict(known.notes), "base": dict(known.base)}
        return {"selection": found, "steps": self.steps, "sums": dict(self._sums)}

    def restore(self, saved: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Selection | None:
        """The inverse of :meth:`saved`: takes over counts and sums, and returns the selection.

        Raises:
            ValueError: it is damaged or for another model; nothing has changed.
        """
        selection = None
        if saved["selection"] is not None:
            masks = {}
            for name, parts in saved["selection"]["masks"].items():
                try:
                    masks[name] = from_parts(parts["kind"], parts["shape"], parts["description"], parts["tensors"])
                except (TypeError, LookupError, ValueError) as error:
                    raise ValueError(f"the selection of the state_dict is damaged at {name}: {error}") from None
            selection = Selection(masks, saved["selection"]["notes"], saved["selection"]["base"])
            found = {name: mask.shape for name, mask in selection.items()}
            if found != self.shapes:
                raise ValueError("the selection of the state_dict is for another model")
        for name, total in saved["sums"].items():
            if name not in parameters or tuple(total.shape) != self.shapes.get(name):
                raise ValueError(f"the gradients added up in the state_dict are for another model, first {name}")
        self.steps = saved["steps"]
        self._sums = {name: total.to(parameters[name].device, copy=True) for name, total in saved["sums"].items()}
        return selection


def _require_gradients(rules: Mapping[str, Rule], parameters: Mapping[str, Tensor]) -> None:
    """Refuses quantised weights, which get no gradients by which an optimizer could rank them."""
    quantised = [
        name for name, rule in rules.items() if rule.action == "rank" and isinstance(parameters[name], StandIn)
    ]
    if quantised:
        raise ValueError(
            f"{len(quantised)} ranked weights are quantised, first {quantised[0]}: backward leaves no gradients on "
            "them for an optimizer to rank. Call gradsel.select(model, ...) and gradsel.attach(model, selection), and "
            "make the optimizer without a policy"
        )


def model_of(params: Any, model: nn.Module | None) -> nn.Module:
    """The model whose parameters an optimizer is given.

    Names do not tell a norm from a matrix, but modules do, so the rules need the model. ``model.named_parameters()`` is
    a generator that has it.
    """
    if model is None and inspect.isgenerator(params):
        model = inspect.getgeneratorlocals(params).get("self")
    if not isinstance(model, nn.Module):
        raise ValueError(
            "policy selects by the kinds of layers, so it needs the model: pass model.named_parameters() itself, or "
            "groups of named parameters and model=model"
        )
    return model


def fingerprints_of(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprints of weights, by which a selection knows its model."""
    return {name: weights.fingerprint(parameter) for name, parameter in parameters.items() if has_memory(parameter)}


def require_agreement(masks: Mapping[str, Mask]) -> None:
    """Checks that all processes have chosen the same entries, as they do if their gradients have been reduced.

    Raises:
        RuntimeError: they have not; it names a parameter.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    own = {name: fingerprint(mask) for name, mask in masks.items()}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            differing = [name for name in own if other.get(name) != everywhere[0].get(name)]
            raise RuntimeError(
                f"ranks 0 and {rank} have selected different entries, first in {differing[0] if differing else 'none'}"
                ": their gradients differ, so they have not been reduced. Use DistributedDataParallel, or "
                "select(process_group=) before training"
            )


def _check_steps(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a number of steps, at least {least}, got {value!r}")


@torch.no_grad()
def silent_rows(selected: Tensor) -> int:
    """How many rows of selected gradients [rows, k] are zero."""
    return int((selected == 0).all(1).sum()) if selected.numel() else 0
