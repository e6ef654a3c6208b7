"""Quantised weights of Linear layers: how the libraries that store them are asked for the dense weight."""

from gradsel.quantised.finding import (
    keeps_elsewhere,
    keeps_own_state,
    quantised_weight,
    require_known,
    weight_parameter,
)
from gradsel.quantised.formats import Quantised, StandIn
from gradsel.quantised.layers import Fixed, Forward, Ranked, install, installed, uninstall
from gradsel.quantised.unknown import opaque_layers, why_opaque, why_unknown

__all__ = [
    "Fixed", "Forward", "Quantised", "Ranked", "StandIn", "install", "installed", "keeps_elsewhere", "keeps_own_state",
    "opaque_layers", "quantised_weight", "require_known", "uninstall", "weight_parameter", "why_opaque", "why_unknown",
]  # fmt: skip
