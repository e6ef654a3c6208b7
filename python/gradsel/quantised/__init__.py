"""Quantised weights of Linear layers: how the libraries that store them are asked for the dense weight."""

from gradsel.quantised.finding import quantised_in, quantised_weight, require_known
from gradsel.quantised.formats import Quantised, StandIn
from gradsel.quantised.layers import Fixed, Forward, Ranked, install, installed, uninstall
from gradsel.quantised.unknown import opaque_layers, why_unknown

__all__ = [
    "Fixed", "Forward", "Quantised", "Ranked", "StandIn", "install", "installed", "opaque_layers", "quantised_in",
    "quantised_weight", "require_known", "uninstall", "why_unknown",
]  # fmt: skip
