"""Sparse fine-tuning: choose the weights that matter, and train only those.

:func:`select` finds them from gradients, :func:`attach` makes a model compute no other gradients, and
:class:`MaskedAdam` trains them. The kernels are in :mod:`gradsel_kernels`.
"""

from gradsel.delta import Delta, TaskBank, export, load_delta, save_delta
from gradsel.nn import AttachReport, attach, detach, sync, trainable_parameters
from gradsel.optim import MaskedAdam, MaskedAdamW, anchored_groups, state_bytes
from gradsel.papers import presets, trainable_count
from gradsel.parameters import ranked_sizes
from gradsel.ranking import (
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
    random_scores,
    select,
)
from gradsel.selection import Selection, freeze
from gradsel_kernels import __version__

__all__ = [
    "AttachReport",
    "Columns",
    "Criterion",
    "Delta",
    "Global",
    "MaskedAdam",
    "MaskedAdamW",
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
    "export",
    "freeze",
    "load_delta",
    "presets",
    "random_scores",
    "ranked_sizes",
    "save_delta",
    "select",
    "state_bytes",
    "sync",
    "trainable_count",
    "trainable_parameters",
]
