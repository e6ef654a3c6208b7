"""Sparse fine-tuning: choose the weights that matter, and train only those.

:func:`select` finds them from gradients, :func:`attach` makes a model compute no other gradients, and
:class:`MaskedAdam` trains them; :func:`finetune` does all of it on a data set. The kernels are in
:mod:`gradsel_kernels`.

Names are imported when they are first used, so that ``gradsel --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsel import integrations as integrations
    from gradsel import methods as methods
    from gradsel import peft as peft
    from gradsel import training as training
    from gradsel.delta import Delta, TaskBank, export, load_delta, save_delta
    from gradsel.integrations.patches import Patches, patches
    from gradsel.nn import AttachReport, MergeReport, attach, detach, merge, sync, trainable_parameters
    from gradsel.optim import MaskedAdam, MaskedAdamW, anchored_groups, state_bytes
    from gradsel.papers import presets, trainable_count
    from gradsel.parameters import ranked_sizes
    from gradsel.ranking import (
        ByMass,
        Columns,
        Criterion,
        Global,
        PerLayer,
        PerNeuron,
        Rows,
        SupConLoss,
        contrastive,
        cross_entropy,
        easiest_subset,
        equal_budget,
        features,
        random_scores,
        select,
    )
    from gradsel.selection import Selection, freeze
    from gradsel.training import evaluate, finetune, predict, resume
    from gradsel_kernels import __version__

_NAMES = {
    "gradsel.delta": ("Delta", "TaskBank", "export", "load_delta", "save_delta"),
    "gradsel.integrations.patches": ("Patches", "patches"),
    "gradsel.nn": ("AttachReport", "MergeReport", "attach", "detach", "merge", "sync", "trainable_parameters"),
    "gradsel.optim": ("MaskedAdam", "MaskedAdamW", "anchored_groups", "state_bytes"),
    "gradsel.papers": ("presets", "trainable_count"),
    "gradsel.parameters": ("ranked_sizes",),
    "gradsel.ranking": (
        "ByMass",
        "Columns",
        "Criterion",
        "Global",
        "PerLayer",
        "PerNeuron",
        "Rows",
        "SupConLoss",
        "contrastive",
        "cross_entropy",
        "easiest_subset",
        "equal_budget",
        "features",
        "random_scores",
        "select",
    ),
    "gradsel.selection": ("Selection", "freeze"),
    "gradsel.training": ("evaluate", "finetune", "predict", "resume"),
    "gradsel_kernels": ("__version__",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_ROOMS = (
    "attached",
    "delta",
    "dtypes",
    "errors",
    "integrations",
    "interrupts",
    "masks",
    "methods",
    "nn",
    "optim",
    "papers",
    "parameters",
    "peft",
    "quantised",
    "ranking",
    "sealed",
    "selection",
    "tables",
    "training",
    "views",
)

__all__ = [
    "AttachReport",
    "ByMass",
    "Columns",
    "Criterion",
    "Delta",
    "Global",
    "MaskedAdam",
    "MaskedAdamW",
    "MergeReport",
    "Patches",
    "PerLayer",
    "PerNeuron",
    "Rows",
    "Selection",
    "SupConLoss",
    "TaskBank",
    "__version__",
    "anchored_groups",
    "attach",
    "contrastive",
    "cross_entropy",
    "detach",
    "easiest_subset",
    "equal_budget",
    "evaluate",
    "export",
    "features",
    "finetune",
    "freeze",
    "load_delta",
    "merge",
    "patches",
    "predict",
    "presets",
    "random_scores",
    "ranked_sizes",
    "resume",
    "save_delta",
    "select",
    "state_bytes",
    "sync",
    "trainable_count",
    "trainable_parameters",
]


if not TYPE_CHECKING:  # or every name would have a type, misspelt ones too

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            found = getattr(_imported(_HOME[name]), name)
            globals()[name] = found
            return found
        if name in _ROOMS:
            return _imported(f"gradsel.{name}")
        raise AttributeError(f"module 'gradsel' has no attribute {name!r}")


def _imported(room: str) -> Any:
    if room == "gradsel.nn":
        import_module("gradsel.delta")  # by which an attached model saves a delta beside its weights
    return import_module(room)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
