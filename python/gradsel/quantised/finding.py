"""Finding the quantised weights of a model, whichever library stores them."""

from __future__ import annotations

from torch import nn

from gradsel.quantised.adapted import adapted
from gradsel.quantised.bitsandbytes import eight_bit, four_bit
from gradsel.quantised.formats import Quantised, StandIn
from gradsel.quantised.torchao import weight_only


def quantised_weight(module: nn.Module, short: str = "weight") -> Quantised | None:
    """The quantised weight of a layer, if it is one of a format that can be trained; see :func:`why_unknown`."""
    if short != "weight":
        return None
    if isinstance(module, nn.Linear) and "weight" in module._parameters:
        for found in (four_bit(module), eight_bit(module), weight_only(module)):
            if found is not None:
                return found
    return adapted(module)


def weight_parameter(module: nn.Module, short: str) -> nn.Parameter:
    """A parameter of a module; a stand-in for a quantised weight that the module keeps in other tensors."""
    parameter = module._parameters.get(short)
    if parameter is None:
        quantised = quantised_weight(module, short)
        assert quantised is not None
        return StandIn(quantised)
    return parameter


def keeps_elsewhere(module: nn.Module) -> bool:
    """Whether a layer keeps a quantised weight in other tensors than a parameter called ``weight``."""
    return module._parameters.get("weight") is None and quantised_weight(module) is not None


def keeps_own_state(module: nn.Module) -> bool:
    """Whether a quantised layer saves and loads its own tensors only, and no parameter that is put beside them."""
    found = quantised_weight(module)
    return found is not None and found.own_state


def require_known(module: nn.Module, name: str) -> Quantised:
    """The quantised weight of a layer.

    Raises:
        RuntimeError: the layer has another weight now.
    """
    found = quantised_weight(module)
    if found is None:
        kind = type(getattr(module, "weight", None)).__name__
        raise RuntimeError(
            f"{name} was quantised when the model was attached and is a {kind} now; call "
            "gradsel.detach(model, restore=True), and attach anew"
        )
    return found
