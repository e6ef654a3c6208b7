"""The state_dicts of MaskedAdam: loading its own and those of torch's Adam, and writing dense ones for torch's Adam."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

from torch import Tensor

from gradsel.attached import owner_of
from gradsel.masks import Mask
from gradsel.optim.call import State, Target, target_of
from gradsel.optim.groups import check_sizes, complete_options, names_of, plain_name
from gradsel.optim.state import dense, fitted, is_dense

Groups = list[dict[str, Any]]


def loaded(state_dict: dict[str, Any], groups: Groups, targets: Iterable[Iterable[Target]]) -> dict[str, Any]:
    """A state_dict as the argument of ``__setstate__``. It shares nothing with the state_dict.

    Args:
        groups: the optimizer's.
        targets: of the parameters of each group.

    Raises:
        ValueError: other groups, or a state trained with another selection.
    """
    saved_groups = deepcopy(state_dict["param_groups"])
    check_sizes(groups, saved_groups)
    target_of_key: dict[Any, tuple[Target, str]] = {}
    for group, own, saved in zip(groups, targets, saved_groups, strict=True):
        ordered = _in_order_of(saved, group, list(own), state_dict["state"])
        target_of_key.update(zip(saved["params"], ordered, strict=True))
    states: defaultdict[Any, Any] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if key not in target_of_key:
            states[key] = deepcopy(saved)
        elif found := fitted(saved, *target_of_key[key]):
            states[target_of_key[key][0].parameter] = found
    for group, saved in zip(groups, saved_groups, strict=True):
        if _plain_names(saved, group):
            saved["param_names"] = group["param_names"]
        elif "param_names" in group:
            saved.setdefault("param_names", group["param_names"])
        saved["params"] = group["params"]
        complete_options(saved, group)
    return {"state": states, "param_groups": saved_groups}


def dense_state_dict(groups: Groups, states: Mapping[Tensor, State], masks: Mapping[Tensor, Mask]) -> dict[str, Any]:
    """A state_dict for ``torch.optim.Adam``; see :meth:`gradsel.MaskedAdam.dense_state_dict`."""
    parameters = list(chain.from_iterable(group["params"] for group in groups))
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    targets = (target_of(parameter, masks) for parameter in parameters if parameter in states)
    state = {numbers[target.parameter]: dense(states[target.parameter], target.mask) for target in targets}
    dense_groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in groups]
    for group in dense_groups:
        if "param_names" in group:
            group["param_names"] = [plain_name(name) for name in group["param_names"]]
    return {"state": state, "param_groups": deepcopy(dense_groups)}


def _in_order_of(
    saved: dict[str, Any], group: dict[str, Any], targets: Sequence[Target], states: Mapping[Any, Any]
) -> list[tuple[Target, str]]:
    """The named targets of a group in the order of a saved one: by name if both have names, otherwise by place."""
    named = _named(group, targets)
    if names := _plain_names(saved, group):
        by_name = dict(zip(map(plain_name, group["param_names"]), named, strict=True))
        return [by_name[name] for name in names]
    for key, (target, name) in zip(saved["params"], named, strict=True):
        if target.is_compact and is_dense(states.get(key), target.mask):
            raise ValueError(
                f"{name} belongs to an attached model, which takes a dense state by name only, because attach() "
                "orders parameters anew: give names to both optimizers, as in "
                "[(name, p) for name, p in model.named_parameters() if p.requires_grad]"
            )
    return named


def _named(group: dict[str, Any], targets: Sequence[Target]) -> list[tuple[Target, str]]:
    """Targets with the names of their parameters; without names, with their numbers in the group."""
    names = names_of(group) or [f"parameter {number}" for number in range(len(targets))]
    owners = [owner_of(target.parameter) for target in targets]
    return [
        (target, name if owner is None else owner[1].name)
        for target, name, owner in zip(targets, names, owners, strict=True)
    ]


def _plain_names(saved: dict[str, Any], group: dict[str, Any]) -> list[str] | None:
    """The plain names of a saved group, if the group has the same names in any order."""
    both = names_of(saved), names_of(group)
    if not all(both):
        return None
    names, own = ([plain_name(name) for name in each or ()] for each in both)
    return names if len(set(own)) == len(own) and set(names) == set(own) else None
