"""Ways to fine-tune a model, one small class each, all with the interface of :class:`Method`."""

from gradsel.methods.base import Context, Method, Prepared
from gradsel.methods.dense import Full, Lora
from gradsel.methods.registry import METHODS, method
from gradsel.methods.selected import GPS, GRFT, Bias, Linear

__all__ = [
    "GPS",
    "GRFT",
    "METHODS",
    "Bias",
    "Context",
    "Full",
    "Linear",
    "Lora",
    "Method",
    "Prepared",
    "method",
]
