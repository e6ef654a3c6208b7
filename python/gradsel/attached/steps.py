"""From values to their weight: for optimizers, which know parameters and not modules."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradsel.attached.selected import LINK, SUFFIX, Selected, SelectedValues, is_values
from gradsel_kernels._warnings import user_stacklevel


def owner_of(parameter: Tensor) -> tuple[Tensor, Selected] | None:
    """The weight that ``parameter`` holds values of, and how they are selected; None for any other parameter.

    Raises:
        RuntimeError: the model holds other values instead of these.
    """
    selected: Selected | None = vars(parameter).get(LINK) if is_values(parameter) else None
    if selected is None:
        return None
    if selected.shards is not None:
        if selected.shards.values is not parameter:
            raise RuntimeError(
                f"the optimizer holds {selected.name}{SUFFIX} as it was before FSDP sharded it, or gathered for a "
                "forward, so training would have no effect. Make the optimizer after fully_shard(), and not between a "
                "forward and its backward; after a forward without backward, call model.reshard() first"
            )
        return selected.shards.both[0], selected
    current = selected.values()
    if current is not parameter and current is not None:
        raise RuntimeError(
            f"the optimizer holds values of {selected.name} that the model no longer has: {selected.name}{SUFFIX} is "
            f"now a {type(current).__name__} of its own, so training would have no effect. Make the optimizer after "
            "whatever replaces parameters (load_state_dict(assign=True), for example)"
        )
    if current is None:
        return None
    weight = selected.weight()
    if weight is None:
        raise RuntimeError(
            f"{selected.name} has been replaced or taken away since attach(), so {selected.name}{SUFFIX} no longer "
            "trains anything; assign to the module's attribute or write to the weight in place, or call "
            "gradsel.detach(model)"
        )
    return weight, selected


def links_of(parameter: Tensor) -> list[tuple[dict, str, Any]]:
    """Where :func:`owner_of` found its answer: while these keys of these dicts hold these objects, it is the same."""
    selected: Selected | None = vars(parameter).get(LINK)
    if selected is None:
        return []
    found: list[tuple[dict, str, Any]] = [(vars(parameter), LINK, selected), (vars(selected), "mask", selected.mask)]
    for reference, short in selected.sites:
        module = reference()
        if module is not None and module._parameters.get(short + SUFFIX) is parameter:
            own = module._parameters
            found += [(own, name, own[name]) for name in (short, short + SUFFIX) if name in own]
            break
    return found


def _owned(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor, Selected]]:
    """Values, weight and selection of all values that an optimizer holds."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = owner_of(parameter)
            if owner is not None:
                yield (parameter, *owner)


@torch.no_grad()
def _write(optimizer: Optimizer) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        for values, weight, selected in _owned(optimizer):
            selected.write(weight, values)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Closures see the weights that the optimizer tries, not those before the step (LBFGS)."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure) or next(_owned(optimizer), None) is None:
        return None

    def synced() -> Any:
        _write(optimizer)
        return closure()

    if "closure" in kwargs:
        return args, {**kwargs, "closure": synced}
    return (args[0], synced, *args[2:]), kwargs


_stepped: weakref.WeakSet = weakref.WeakSet()


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _finish(optimizer)
    elif not getattr(optimizer, "writes_weights", False):  # otherwise the compiled step writes them
        torch.compiler.disable(_finish)(optimizer)


def _finish(optimizer: Optimizer) -> None:
    """Writes what a step has changed, and looks at an optimizer after its first one."""
    if not getattr(optimizer, "writes_weights", False):
        _write(optimizer)
    if optimizer not in _stepped:
        _stepped.add(optimizer)
        _report_unreached(optimizer)


def _report_unreached(optimizer: Optimizer) -> None:
    """Names the values that the first backward has not reached, and weights that are held without their values."""
    owned = list(_owned(optimizer))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    alone = [
        selected.name
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (selected := vars(parameter).get(LINK)) is not None
        and not is_values(parameter)
        and id(selected.values()) not in held
        and selected.values() is not None
    ]
    if alone:
        warnings.warn(
            f"the optimizer holds {some(alone)}, whose selected entries are trained through {alone[0]}{SUFFIX}, which "
            "it does not hold: they stay as they are. Pass gradsel.trainable_parameters(model)",
            stacklevel=user_stacklevel(),
        )
    undecayed = [
        selected.name
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (selected := vars(parameter).get(LINK)) is not None
        and is_values(parameter)
        and parameter.ndim < 2 <= len(selected.mask.shape)
        and not group.get("weight_decay")
    ]
    if undecayed and any(group.get("weight_decay") for group in optimizer.param_groups):
        warnings.warn(
            f"the values of {some(undecayed)} have one dimension, although they stand for entries of matrices, and "
            "are in a group without weight decay, like biases. If the groups were made by p.dim() >= 2, go by names",
            stacklevel=user_stacklevel(),
        )
    if owned and "muon" in type(optimizer).__name__.lower():
        warnings.warn(
            f"{type(optimizer).__name__} makes updates of matrices orthogonal, and values such as "
            f"{owned[0][2].name}{SUFFIX} are entries of matrices, and none themselves: use gradsel.MaskedAdam, or "
            "another optimizer that treats every entry on its own",
            stacklevel=user_stacklevel(),
        )
    unreached = [selected.name for values, _, selected in owned if values.grad is None]
    if unreached and any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        warnings.warn(
            f"{len(unreached)} of {len(owned)} selected weights got no gradient in the first backward: "
            f"{some(unreached)}. Either the loss does not depend on them, or the model reads them in a way that "
            "attach() cannot see.",
            stacklevel=user_stacklevel(),
        )


def some(names: list[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def watch_optimizers() -> None:
    """Makes every ``torch.optim`` optimizer write values to their weights, and looks at each once more."""
    _stepped.clear()
    _register_hooks()


@cache
def _register_hooks() -> None:
    _let_optimizers_use_foreach()
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@cache
def _let_optimizers_use_foreach() -> None:
    """torch's optimizers choose their fast implementations for tensors of known types only."""
    with contextlib.suppress(ImportError):  # private, and of no consequence but speed
        from torch.optim.optimizer import _foreach_supported_types

        _foreach_supported_types.append(SelectedValues)
