"""The parameter groups of MaskedAdam: their masks, and the checks of their options and parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices

from gradsel.attached import SUFFIX, owner_of
from gradsel.masks import Mask, Whole
from gradsel.parameters.claimed import ADVICE, is_partitioned
from gradsel.parameters.names import strip_wrappers
from gradsel.selection.selection import lookup
from gradsel.sharding import is_sharded
from gradsel_kernels._warnings import user_stacklevel

#: Options that a parameter group from an older version of torch's Adam, or of MaskedAdam, may lack.
_LATER_OPTIONS: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
#: Options that torch's Adam does not have.
_OWN_OPTIONS: dict[str, Any] = {
    "anchor": 0.0,
    "anchor_decoupled": False,
    "anchor_norm": 2,
    "low_precision": "master",
    "seed": 0,
    "state_dtype": None,
}


def complete_options(options: dict[str, Any], group: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Adds missing options to a group or the defaults. Those that only MaskedAdam has are copied from ``group``."""
    for name, value in _LATER_OPTIONS.items():
        options.setdefault(name, value)
    for name, value in _OWN_OPTIONS.items():
        options.setdefault(name, group.get(name, value))


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers. Values of an attached weight have the weight's name."""
    return strip_wrappers(name).removesuffix(SUFFIX)


def names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a group's parameters; None if they have none, or are not those that were named.

    DeepSpeed puts one tensor into the place of all parameters of a group, and leaves the names.
    """
    names = group.get("param_names")
    return names if names and len(names) == len(group["params"]) else None


def bind(group: dict[str, Any], masks: Mapping[str, Mask] | None) -> dict[Tensor, Mask]:
    """The mask of every parameter of a group."""
    params = group["params"]
    if masks is None:
        return {parameter: Whole(parameter.shape) for parameter in params}
    if any(owner_of(parameter) is not None for parameter in params):
        raise ValueError("the model is attached, so its parameters know what is selected; leave out masks")
    check_names(group)
    bound: dict[Tensor, Mask] = {}
    for name, parameter in zip(group["param_names"], params, strict=True):
        mask = lookup(masks, name)
        if not isinstance(mask, Mask):
            raise TypeError(
                f"the mask of {name} is a {type(mask).__name__}; Selection.from_dense(masks) takes boolean tensors"
            )
        if is_partitioned(parameter):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed's ZeRO-3, so MaskedAdam takes no mask for it. {ADVICE}"
            )
        if mask.shape != tuple(parameter.shape):
            raise ValueError(
                f"the mask of {name} is for shape {list(mask.shape)}, the parameter has {list(parameter.shape)}; "
                "select on this model"
            )
        if is_sharded(parameter) and mask.nnz and not mask.is_whole:
            raise ValueError(
                f"{name} is a DTensor, for which MaskedAdam takes no mask: call gradsel.attach(model, selection), and "
                "leave out masks"
            )
        bound[parameter] = mask.to(parameter.device)
    return bound


def check_names(group: dict[str, Any]) -> None:
    if "param_names" not in group:
        raise ValueError(
            "masks and policy go by parameter name, but the parameters have no names; "
            "pass model.named_parameters() instead of model.parameters()"
        )


def replaced_by_hand(parameter: Tensor) -> str:
    """What is wrong with a parameter that no constructor or add_param_group() has seen."""
    return (
        f"a parameter of shape {list(parameter.shape)} was put into a group by hand, so it has no mask; use "
        "add_param_group() or a new optimizer. DeepSpeed does so, except in stage 0 with float32: attach() the model "
        "first, and give MaskedAdam its trainable_parameters() and no masks or policy"
    )


def check_masks(masks: Any) -> None:
    if masks is not None and not isinstance(masks, Mapping):
        raise TypeError(
            f"masks must be a Selection, got {type(masks).__name__}; gradsel.select() makes one, "
            "Selection.from_dense() takes boolean tensors"
        )


def check_torch_options(options: dict[str, Any]) -> None:
    """Checks the options that torch's Adam has, with torch's messages."""
    lr, (beta1, beta2) = options["lr"], options["betas"]
    _check_tensors({"lr": lr}, options)
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not options["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {options['eps']}")
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not options["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
    if isinstance(beta1, Tensor) != isinstance(beta2, Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    _check_tensors({"betas[0]": beta1, "betas[1]": beta2}, options)
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _check_tensors(values: dict[str, Any], options: dict[str, Any]) -> None:
    """Checks hyperparameters that are tensors."""
    foreach = bool(options["foreach"]) and not options["capturable"]
    for name, value in values.items():
        if isinstance(value, Tensor):
            if foreach:
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")


def check_options(options: dict[str, Any]) -> None:
    """Checks the options that only MaskedAdam has, and refuses the one that only torch's Adam has."""
    if options["differentiable"]:
        raise ValueError(
            "MaskedAdam does not support differentiable=True, its kernels write in place; to differentiate through "
            "steps use torch.optim.Adam(differentiable=True) on masked gradients"
        )
    check_anchor(options)
    if options["low_precision"] not in ("master", "kahan", "stochastic"):
        raise ValueError(
            f"Invalid low_precision value: {options['low_precision']!r}; it is 'master', 'kahan' or 'stochastic'"
        )
    if not isinstance(options["seed"], int) or not 0 <= options["seed"] < 2**31:
        raise ValueError(f"Invalid seed value: {options['seed']!r}; it is an integer from 0 to 2**31 - 1")
    if options["state_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"Invalid state_dtype value: {options['state_dtype']}; it is None, torch.float32 or torch.bfloat16"
        )


def check_anchor(options: dict[str, Any]) -> None:
    """Called at every step too, because schedules change the anchor."""
    if not 0.0 <= options["anchor"] < math.inf:
        raise ValueError(f"Invalid anchor value: {options['anchor']}")
    if options["anchor_norm"] not in (1, 2):
        raise ValueError(f"Invalid anchor_norm value: {options['anchor_norm']}; norms are 1 and 2")


def warn_of_rounded_moments(options: dict[str, Any]) -> None:
    if options["state_dtype"] is torch.bfloat16 and options["betas"][1] > 0.99:
        warnings.warn(
            f"with state_dtype=torch.bfloat16 and beta2 = {float(options['betas'][1])} second moments never fall, "
            "because rounding gives back what one step takes; use betas up to 0.99",
            stacklevel=user_stacklevel(),
        )


def check_parameter(parameter: Tensor, capturable: bool) -> None:
    """Refuses parameters that the kernels cannot update."""
    if parameter.is_complex():
        raise RuntimeError("MaskedAdam does not support complex parameters; use torch.view_as_real")
    if capturable and parameter.device.type not in _get_capturable_supported_devices():
        raise AssertionError(
            "If capturable=True, params and state_steps must be on supported devices: "
            f"{_get_capturable_supported_devices()}."
        )


def check_shape(mask: Mask, parameter: Tensor) -> None:
    """Refuses a parameter that has been given another shape since its mask was made."""
    if not mask.is_whole and owner_of(parameter) is None and mask.shape != tuple(parameter.shape):
        raise ValueError(
            f"a parameter has the shape {list(parameter.shape)} now, but its mask is for {list(mask.shape)}: "
            "make a new optimizer after a layer has been resized, or the model detached"
        )


def check_sizes(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """Compares the sizes of groups, with torch's messages."""
    if len(groups) != len(saved_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    sizes = ((len(group["params"]), len(saved["params"])) for group, saved in zip(groups, saved_groups, strict=True))
    if any(size != saved_size for size, saved_size in sizes):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
