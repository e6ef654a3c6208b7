"""Another selection for an optimizer that has one, made or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradsel.attached import owner_of
from gradsel.masks import Mask
from gradsel.optim.groups import bind, check_masks
from gradsel.optim.state import migrated
from gradsel.optim.stepping import Stepping
from gradsel.parameters.names import strip_wrappers
from gradsel.selection.selection import Selection


def reselect_with(optimizer: Stepping, selection: Selection | Mapping[str, Mask]) -> None:
    """See :meth:`gradsel.MaskedAdam.reselect`."""
    check_masks(selection)
    groups = _groups(optimizer)
    if any(owner_of(parameter) is not None for group in groups for parameter in group["params"]):
        raise ValueError(
            "the model is attached; detach it, attach it with the new selection, and load dense_state_dict() into "
            "a new optimizer"
        )
    masks: dict[Tensor, Mask] = {}
    for group in groups:
        masks.update(bind(group, selection))
    kept = optimizer.state
    states = {
        parameter: migrated(kept[parameter], optimizer._masks[parameter].to(parameter.device), mask, parameter)
        for parameter, mask in masks.items()
        if parameter in kept
    }
    for parameter, state in states.items():
        if state:
            kept[parameter] = state
        else:
            del kept[parameter]
    optimizer.has_reselected |= optimizer._selection is not None
    optimizer._selection = selection
    optimizer._masks.update(masks)
    optimizer._forget_calls()
    if optimizer._selector is not None:
        optimizer._selector.chosen()


def load_selection(optimizer: Stepping, state_dict: dict[str, Any]) -> None:
    """Takes the selection from a state_dict of an optimizer with ``policy``."""
    saved = state_dict.get("selection")
    if optimizer._selector is None or saved is None:
        return
    groups = _groups(optimizer)
    named = {
        strip_wrappers(n): p for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)
    }
    optimizer._selection = optimizer._selector.restore(saved, named)
    for group in groups:
        optimizer._masks.update(bind(group, optimizer._selection))


def _groups(optimizer: Stepping) -> list[dict[str, Any]]:
    """The groups without masks of their own."""
    own = optimizer._own_masks
    return [group for group in optimizer.param_groups if not any(p in own for p in group["params"])]
