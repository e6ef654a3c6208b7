"""Experiments: many runs of ``gradsel finetune`` under equal conditions, and what came of them in one file.

``compare`` is imported when it is first used, so that :mod:`gradsel.experiments.cost` need not wait for the Trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsel.experiments.comparing import Comparison, compare

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("gradsel.experiments.comparing"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
