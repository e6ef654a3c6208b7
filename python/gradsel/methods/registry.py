"""Methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from gradsel.errors import did_you_mean
from gradsel.methods.added import SSF, Adapter
from gradsel.methods.base import Method
from gradsel.methods.by_peft import Lora, Miss, Shira
from gradsel.methods.full import Full
from gradsel.methods.prompting import VPTDeep, VPTShallow
from gradsel.methods.ranked import GPS, GRFT
from gradsel.methods.sensitive import SPTAdapter, SPTLora
from gradsel.methods.unranked import Bias, Linear, Paca

_KINDS: tuple[type[Method], ...] = (
    GPS, GRFT, Full, Linear, Bias, Adapter, VPTShallow, VPTDeep, SSF, SPTAdapter, SPTLora, Lora, Shira, Miss, Paca,
)  # fmt: skip
#: Every method by its name.
METHODS: Mapping[str, type[Method]] = MappingProxyType({kind.name: kind for kind in _KINDS})


def method(name: str, **options: Any) -> Method:
    """A method by name.

    Args:
        name: a key of :data:`METHODS`.
        **options: its options; those left out have their defaults.

    Raises:
        ValueError: there is no such method or option, or a value is out of range.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}{did_you_mean(name, METHODS)}; there are {', '.join(METHODS)}")
    known = [option.name for option in fields(METHODS[name])]
    for given in options:
        if given not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name} has no option {given!r}{did_you_mean(given, known)}; {has}")
    return METHODS[name](**options)
