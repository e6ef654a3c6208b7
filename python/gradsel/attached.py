"""From the values of an attached module to their weight, for optimizers: they know parameters, not modules.

Values are parameters of their own. :class:`~gradsel.optim.MaskedAdam` asks :func:`owner_of` for the weight and writes
it in its kernel. For any other ``torch.optim`` optimizer, hooks write the values to their weights after its step, and
before each evaluation of a closure inside it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from gradsel.masks import Mask

#: What attach() appends to a parameter's name for its values.
SUFFIX = "_values"
#: The attribute of an attached module that says what is selected, by parameter name.
STATE = "_gradsel_selected"


@dataclass
class Selected:
    """What one parameter of an attached module is trained by.

    Attributes:
        name: the parameter's name in the model.
        mask: its selected entries.
        original: their values at attach(), in the parameter's dtype.
        how: the Product or Lookup of the direct route; None on the harvest route.
        taps: the Taps of a convolution on the direct route.
    """

    name: str
    mask: Mask
    original: Tensor
    how: Any = None
    taps: Any = None

    def to(self, device: torch.device) -> Selected:
        return Selected(
            self.name,
            self.mask.to(device),
            self.original.to(device),
            None if self.how is None else self.how.to(device),
            None if self.taps is None else self.taps.to(device),
        )


@dataclass
class Record:
    """What detach() gives back; kept by the module that attach() was called on."""

    flags: dict[str, bool]  # requires_grad of every parameter
    wholes: dict[str, Tensor]  # original values of the parameters that are trained whole


RECORD = "_gradsel_record"


# values -> (weak reference to a module, parameter name) of every module that owns them: tied weights have several
_links: WeakIdKeyDictionary = WeakIdKeyDictionary()


def selected_in(module: Any) -> dict[str, Selected]:
    """What is selected in a module, by parameter name; nothing in one that is not attached."""
    selected: dict[str, Selected] = vars(module).get(STATE, {})
    return selected


def link(module: Any) -> None:
    """Makes the values of an attached module known to :func:`owner_of`, and to optimizers of any kind."""
    _watch_optimizers()
    for name in selected_in(module):
        values = module._parameters[name + SUFFIX]
        others = [(other, key) for other, key in _links.get(values, []) if other() not in (None, module)]
        _links[values] = [*others, (weakref.ref(module), name)]


def owner_of(parameter: Tensor) -> tuple[Tensor, Selected] | None:
    """The weight that ``parameter`` holds values of, and how they are selected; None for any other parameter."""
    for reference, name in _links.get(parameter, ()):
        module = reference()
        if module is not None and module._parameters.get(name + SUFFIX) is parameter:
            return module._parameters[name], selected_in(module)[name]
    return None


def links_of(parameter: Tensor) -> list[tuple[dict, str, Any]]:
    """Where :func:`owner_of` found its answer: while these keys of these dicts hold these objects, it is the same.

    Except that a move to another device replaces what is selected, too.
    """
    for reference, name in _links.get(parameter, ()):
        module = reference()
        if module is not None and module._parameters.get(name + SUFFIX) is parameter:
            own = module._parameters
            return [
                (own, name, own[name]),
                (own, name + SUFFIX, parameter),
                (vars(module), STATE, selected_in(module)),
            ]
    return []


def _owned(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor, Selected]]:
    """Values, weight and selection of all values that an optimizer holds."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = owner_of(parameter)
            if owner is not None:
                yield (parameter, *owner)


@torch.no_grad()
def _write(optimizer: Optimizer) -> None:
    for values, weight, selected in _owned(optimizer):
        selected.mask.scatter_(weight, values)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Closures see the weights that the optimizer tries, not those of before the step (LBFGS)."""
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
    if not getattr(optimizer, "writes_weights", False):
        _write(optimizer)
    if optimizer not in _stepped:
        _stepped.add(optimizer)
        _report_unreached(optimizer)


def _report_unreached(optimizer: Optimizer) -> None:
    """Names the values that the first backward has not reached."""
    owned = list(_owned(optimizer))
    unreached = [selected.name for values, _, selected in owned if values.grad is None]
    if unreached and any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        names = ", ".join(unreached[:5]) + (", ..." if len(unreached) > 5 else "")
        warnings.warn(
            f"{len(unreached)} of {len(owned)} selected weights got no gradient in the first backward: {names}. Either "
            "the loss does not depend on them, or the model reads them in a way that attach() cannot see.",
            stacklevel=4,
        )


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
