"""Ways to fine-tune a model, one small class each, all with the interface of :class:`Method`."""

from gradsel.methods.added import SSF, Adapter
from gradsel.methods.base import Context, Method, Parts, Prepared
from gradsel.methods.by_peft import Lora, Miss, Shira
from gradsel.methods.full import Full
from gradsel.methods.prompting import VPTDeep, VPTShallow
from gradsel.methods.ranked import GPS, GRFT
from gradsel.methods.registry import METHODS, method
from gradsel.methods.sensitive import SPTAdapter, SPTLora
from gradsel.methods.unranked import Bias, Linear, Paca

__all__ = [
    "GPS",
    "GRFT",
    "METHODS",
    "SSF",
    "Adapter",
    "Bias",
    "Context",
    "Full",
    "Linear",
    "Lora",
    "Method",
    "Miss",
    "Paca",
    "Parts",
    "Prepared",
    "SPTAdapter",
    "SPTLora",
    "Shira",
    "VPTDeep",
    "VPTShallow",
    "method",
]
