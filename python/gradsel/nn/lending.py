"""What a module reads in place of a parameter, for the time of one forward."""

from __future__ import annotations

from typing import Any

from torch import nn

#: The attribute with the names of what has been lent to a module.
_LENT = "_gradsel_lent"


#: The key of the hook in every module. Code that torch.compile has made for one layer serves another with equal keys.
_KEY = -1


def expect_loans(module: nn.Module) -> None:
    """Makes the module give back what it is lent. The hook stays: one that removes itself breaks those after it."""
    if _KEY not in module._forward_hooks:
        module._forward_hooks[_KEY] = take_back
        module._forward_hooks_always_called[_KEY] = True


def expect_no_loans(module: nn.Module) -> None:
    """Between two forwards: takes the hook off."""
    module._forward_hooks.pop(_KEY, None)
    module._forward_hooks_always_called.pop(_KEY, None)


def lend(module: nn.Module, short: str, given: Any) -> None:
    """Before a forward: lets the module read ``given``, a tensor or what acts as one, as its attribute ``short``."""
    expect_loans(module)
    vars(module).setdefault(_LENT, set()).add(short)
    vars(module)[short] = given


def take_back(module: nn.Module, args: Any, output: Any) -> None:
    """After it, or after the error that it ended with."""
    for short in vars(module).pop(_LENT, ()):
        vars(module).pop(short, None)
