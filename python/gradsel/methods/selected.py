"""Methods that train a selection of the model's entries: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradsel.attached import is_attached
from gradsel.delta.delta import Delta
from gradsel.files import replacing
from gradsel.methods.additions import (
    Addition,
    addition_parameters,
    additions_in,
    load_additions,
    merge_additions,
    place,
    require_linear,
)
from gradsel.methods.base import ADDITIONS, DELTA, NO_PARTS, SELECTION, Context, Method, Parts, Prepared, count
from gradsel.nn.attaching import attach
from gradsel.nn.detaching import detach
from gradsel.optim.adamw import MaskedAdamW
from gradsel.optim.optimizer import MaskedAdam
from gradsel.parameters.names import shaped_parameters
from gradsel.parameters.rules import HEAD, KINDS, RuleOptions, parameter_rules, sizes_of
from gradsel.ranking.policies import Policy
from gradsel.ranking.selecting import select
from gradsel.selection.selection import Selection
from gradsel.tensor_files import save_file

#: Of the kinds of parameters, only the head is trained.
HEAD_ONLY: Mapping[str, str] = MappingProxyType({**dict.fromkeys(KINDS, "freeze"), "head": "whole"})


@dataclass(frozen=True)
class Selected(Method):
    """A method that attaches the model to a selection, so that nothing else gets a gradient."""

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        """What is ranked, trained whole or frozen; see :func:`gradsel.parameters.rules.parameter_rules`."""
        return parts.rules(head)

    def policy(self, sizes: Collection[tuple[int, int]] = ()) -> Policy | None:
        """How many entries are trained, and which compete, in neuron views of these sizes; None: nothing is ranked."""
        return None

    def additions(
        self, model: nn.Module, whole: Collection[str], notes: Mapping[str, Any]
    ) -> dict[str, Callable[[], Addition]]:
        """What is trained besides the selection: makers of additions by the layer that each goes to.

        Args:
            model: plain.
            whole: the names of the parameters that are trained whole, such as the head.
            notes: those of the selection.

        Raises:
            ValueError: the method does not fit the model.
        """
        return {}

    @abstractmethod
    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        """The selection to train."""

    def trained_on(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> int:
        rules, parameters = parameter_rules(model, **self.rules(model, head, parts)), shaped_parameters(model)
        whole = [name for name, rule in rules.items() if rule.action == "whole"]
        with torch.device("meta"):
            added = sum(count(make()) for make in self.additions(model, whole, {}).values())
        sizes = sizes_of(rules, parameters).values()
        policy = self.policy(sizes)
        ranked = 0 if policy is None else policy.budget(sizes)
        return sum(parameters[name].numel() for name in whole) + ranked + added

    def prepare(
        self, model: nn.Module, batches: Iterable[Any] | None = None, context: Context | None = None
    ) -> Prepared:
        context = context or Context()
        total = count(model)
        selection = context.selection
        if selection is None:
            if self.needs_batches and batches is None:
                raise ValueError(f"{self.name} ranks weights by their gradients on training data: pass batches")
            selection = self.choose(model, batches, context)
        else:
            selection.check(model)
        additions = self.additions(model, _whole(selection), selection.notes)
        attach(model, selection)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            place(model, additions)
        added = sum(count(addition) for _, _, addition in additions_in(model))
        return Prepared(model, selection.trainable_count() + added, total, selection)

    def optimizer(
        self, model: nn.Module, lr: float, weight_decay: float = 0.0, decoupled: bool = True,
        head: Iterable[str] = HEAD,
    ) -> Optimizer:  # fmt: skip
        kind = MaskedAdamW if decoupled else MaskedAdam
        return kind(self.rated(self.groups(model, head), lr), lr=lr, weight_decay=weight_decay)

    def rated(self, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        """The groups with learning rates of their own, where the method has several."""
        return groups

    def save(self, prepared: Prepared, folder: Path) -> None:
        assert prepared.selection is not None
        prepared.selection.save(folder / SELECTION)
        Delta.of(prepared.model, selection=prepared.selection).save(folder / DELTA)
        if added := addition_parameters(prepared.model):
            with replacing(folder / ADDITIONS) as unfinished:
                save_file(added, unfinished)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        selection = Selection.load(folder / SELECTION, model)
        additions = self.additions(model, _whole(selection), selection.notes)
        delta = Delta.load(folder / DELTA)
        # Of parameters trained whole nothing of the base is left, so a new head may have been initialised otherwise.
        whole = {name: part for name, part in delta.items() if part.mask.is_whole}
        Delta({name: part for name, part in delta.items() if name not in whole}).apply_(model)
        Delta(whole).apply_(model, force=True)
        if additions:
            with torch.random.fork_rng():
                place(model, additions)
            load_additions(model, folder / ADDITIONS)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        require_linear(model, self.name)
        if is_attached(model):
            detach(model)
        return merge_additions(model)


def _whole(selection: Selection) -> list[str]:
    return [name for name, mask in selection.items() if mask.is_whole]


def head_only(model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> Selection:
    """A selection of the head; it knows the fingerprints of everything else."""
    return by_rules(model, "the head", {"head": head, "kinds": HEAD_ONLY, "whole": parts.head})


def by_rules(model: nn.Module, policy: str, rules: RuleOptions) -> Selection:
    """A selection that ranks nothing."""
    selection = select(model, None, None, criterion="magnitude", **rules)
    selection.notes = {"policy": policy}
    return selection
