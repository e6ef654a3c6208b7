"""Masks to and from SHiRA, PEFT's sparse adapters (Bhardwaj et al. 2024).

This file does not import PEFT; it works with PEFT's objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gradsel.masks import Frozen, Mask, Whole, from_coo
from gradsel.parameters.names import parameter_uses, strip_wrappers

MaskFunction = Callable[..., Tensor]


def mask_function(masks: Mapping[str, Mask], model: nn.Module) -> MaskFunction:
    """``mask_fn(base_layer, r, **kwargs)`` for PEFT's ``ShiraConfig``; see ``Selection.shira_mask_fn``."""
    names = {
        module: name for name, uses in parameter_uses(model).items() for _, module, short in uses if short == "weight"
    }

    def mask_fn(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
        if base_layer not in names:
            raise ValueError(f"{base_layer} is not a layer of the model that shira_mask_fn(model) was called with")
        name = names[base_layer]
        weight = base_layer.get_parameter("weight")
        if name not in masks:
            raise ValueError(f"the selection has no parameter {name!r}; it was made for another model")
        mask = masks[name]
        if mask.shape != tuple(weight.shape):
            raise ValueError(f"{name} is {list(mask.shape)} in the selection, {list(weight.shape)} in the model")
        _check_count(name, mask, r)
        return mask.to_dense().to(weight.device, weight.dtype)

    return mask_fn


def _check_count(name: str, mask: Mask, r: int) -> None:
    step = sum(mask.shape)
    if mask.nnz == r * step:
        return
    hint = (
        f"give it an adapter of its own with r = {mask.nnz // step}"
        if mask.nnz and mask.nnz % step == 0
        else f"no r fits it, as {mask.nnz} is not a positive multiple of {step}: leave it out of target_modules"
    )
    raise ValueError(
        f"{name} has {mask.nnz} selected entries, but PEFT's SHiRA trains exactly r * (in + out) = {r * step} entries "
        f"of a layer with r = {r}; {hint}"
    )


def masks_of(peft_model: nn.Module, adapter: str) -> dict[str, Mask]:
    """The masks of a SHiRA adapter; see ``Selection.from_shira``."""
    get_base_model: Any = getattr(peft_model, "get_base_model", None)
    model: nn.Module = peft_model if get_base_model is None else get_base_model()
    layers: list[Any] = [module for module in model.modules() if adapter in getattr(module, "shira_indices", ())]
    indices = {layer.get_base_layer().weight: layer.shira_indices[adapter] for layer in layers}
    if not indices:
        raise ValueError(f"{type(peft_model).__name__} has no SHiRA layers with an adapter {adapter!r}")
    masks: dict[str, Mask] = {}
    for path, parameter in model.named_parameters():
        name, saved = re.subn(rf"\.modules_to_save\.{re.escape(adapter)}\.", ".", path)
        name = strip_wrappers(re.sub(r"\.(base_layer|original_module)\.", ".", name))
        shape = tuple(parameter.shape)
        if saved:
            masks[name] = Whole(shape)
        elif parameter in indices:
            masks[name] = from_coo(indices[parameter], shape)
        elif ".shira_weight." not in path and ".modules_to_save." not in path:
            masks[name] = Frozen(shape, "not adapted")
    return masks
