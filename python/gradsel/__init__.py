"""Sparse fine-tuning: choose the weights that matter, and train only those.

:func:`select` finds them from gradients, :func:`attach` makes a model compute no other gradients, and
:class:`MaskedAdam` trains them. The kernels are in :mod:`gradsel_kernels`.
"""

from gradsel import presets
from gradsel.anchoring import anchored_groups
from gradsel.attaching import AttachReport, attach, detach, sync, trainable_parameters
from gradsel.counting import trainable_count
from gradsel.criteria import Criterion, random_scores
from gradsel.delta import Delta, load_delta, save_delta
from gradsel.delta_bank import TaskBank
from gradsel.delta_export import export
from gradsel.losses import SupConLoss, contrastive, cross_entropy
from gradsel.optim import MaskedAdam, MaskedAdamW, state_bytes
from gradsel.policies import Columns, Global, PerLayer, PerNeuron, Rows, equal_budget
from gradsel.rules import ranked_sizes
from gradsel.selecting import select
from gradsel.selection import Selection, freeze
from gradsel.subsets import easiest_subset
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
