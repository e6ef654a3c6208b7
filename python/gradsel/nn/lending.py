"""What a module reads in place of a parameter, for the time of one forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: The attribute with the names of what has been lent to a module.
_LENT = "_gradsel_lent"


def lend(module: nn.Module, short: str, tensor: Tensor) -> None:
    """Before a forward: lets the module read ``tensor`` as its attribute ``short``."""
    if take_back not in module._forward_hooks.values():  # stays: a hook that removes itself breaks those after it
        module.register_forward_hook(take_back, always_call=True)
    vars(module).setdefault(_LENT, set()).add(short)
    vars(module)[short] = tensor


def take_back(module: nn.Module, args: Any, output: Any) -> None:
    """After it, or after the error that it ended with."""
    for short in vars(module).pop(_LENT, ()):
        vars(module).pop(short, None)
