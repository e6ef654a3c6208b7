"""Finding the quantised weights of a model, whichever library stores them."""

from __future__ import annotations

from torch import nn

from gradsel.quantised.bitsandbytes import eight_bit, four_bit
from gradsel.quantised.formats import Quantised
from gradsel.quantised.torchao import weight_only


def quantised_weight(module: nn.Module, short: str = "weight") -> Quantised | None:
    """The quantised weight of a layer, if it is one of a format that can be trained; see :func:`why_unknown`."""
    if short != "weight" or not isinstance(module, nn.Linear) or "weight" not in module._parameters:
        return None
    for found in (four_bit(module), eight_bit(module), weight_only(module)):
        if found is not None:
            return found
    return None


def quantised_in(model: nn.Module) -> dict[int, Quantised]:
    """All quantised weights of a model, by the ``id`` of the parameters that store them."""
    found: dict[int, Quantised] = {}
    for module in model.modules():
        quantised = quantised_weight(module)
        if quantised is not None:
            found[id(module._parameters["weight"])] = quantised
    return found


def require_known(module: nn.Module, name: str) -> Quantised:
    """The quantised weight of a layer.

    Raises:
        RuntimeError: the layer has another weight now.
    """
    found = quantised_weight(module)
    if found is None:
        kind = type(module._parameters.get("weight")).__name__
        raise RuntimeError(
            f"{name} was quantised when the model was attached and is a {kind} now; call "
            "gradsel.detach(model, restore=True), and attach anew"
        )
    return found
