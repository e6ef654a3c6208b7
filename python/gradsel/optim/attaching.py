"""Turning an optimizer with masks, and its model, into those of an attached model: the same training, cheaper."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsel.attached import SUFFIX
from gradsel.masks import Mask
from gradsel.nn import AttachReport, attach
from gradsel.optim.selector import NOT_GIVEN
from gradsel.optim.stepping import Stepping
from gradsel.parameters.names import named_parameters, strip_wrappers
from gradsel.selection.selection import Selection
from gradsel_kernels._warnings import user_stacklevel


@torch.no_grad()
def attach_with(optimizer: Stepping, model: nn.Module, selection: Selection | None) -> AttachReport:
    """See :meth:`gradsel.MaskedAdam.attach`."""
    if selection is None:
        raise ValueError("nothing has been selected yet; call attach() after the step that selects")
    if optimizer._selector is not None and optimizer._selector.every is not None:
        raise ValueError("reselect_every ranks dense gradients, which an attached model does not form; leave it out")
    parameters = named_parameters(model)
    _require_unwrapped(optimizer, model)
    for group in optimizer.param_groups:
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=True):
            if parameters.get(strip_wrappers(name)) is not parameter:
                raise ValueError(f"the optimizer trains {name}, which is not a parameter of this model; pass its model")
    left = [
        name
        for name, mask in selection.items()
        if mask.label == NOT_GIVEN and name in parameters and parameters[name].requires_grad
    ]
    report = attach(model, selection)
    if left:
        warnings.warn(
            f"{len(left)} parameters that this optimizer does not have are frozen now, first {left[0]}. If another "
            'optimizer trains them, give them to this one instead, in a group with "masks": None',
            stacklevel=user_stacklevel(),
        )
    attached = named_parameters(model)
    state, masks = optimizer.state, optimizer._masks
    own: dict[Tensor, Mask] = {}
    for group in optimizer.param_groups:  # in place: schedulers hold the groups
        kept: list[tuple[str, Tensor]] = []
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            mask = masks[parameter]
            if mask.is_whole and mask.nnz:
                kept.append((name, parameter))
                own[parameter] = mask
                continue
            known: dict[str, Any] = state.pop(parameter, {})
            if not mask.nnz:
                continue
            values = attached[strip_wrappers(name) + SUFFIX]
            exact = known.pop("master", None)
            lost = known.pop("compensation", None)
            if exact is not None:
                values.copy_(exact)
            elif lost is not None:
                values.add_(lost)
            if known:
                state[values] = known
            kept.append((name + SUFFIX, values))
            own[values] = mask
        group["param_names"] = [name for name, _ in kept]
        group["params"] = [parameter for _, parameter in kept]
    optimizer._masks = own
    optimizer._own_masks = {}
    optimizer._selection = selection
    optimizer._versions = {}
    optimizer._forget_calls()
    optimizer._selector = None
    return report


def _require_unwrapped(optimizer: Stepping, model: nn.Module) -> None:
    """Refuses the model inside DistributedDataParallel, which would not reduce gradients of parameters that are new."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    given = (name for group in optimizer.param_groups for name in group.get("param_names", ()))
    own = {name for name, _ in model.named_parameters()}
    if any(name.removeprefix("_orig_mod.").startswith("module.") and name not in own for name in given):
        raise ValueError(
            "the optimizer was made for a model in DistributedDataParallel, which has registered its parameters "
            "already and would not reduce the gradients of others: attach() before wrapping the model"
        )
