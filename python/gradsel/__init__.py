"""Sparse fine-tuning: choose the weights that matter, and train only those.

:func:`select` finds them from gradients, :func:`attach` makes a model compute no other gradients, and
:class:`MaskedAdam` trains them. The kernels are in :mod:`gradsel_kernels`.
"""

from gradsel.attaching import AttachReport, attach, detach, sync, trainable_parameters
from gradsel.criteria import Criterion, random_scores
from gradsel.losses import SupConLoss
from gradsel.optim import MaskedAdam, MaskedAdamW, state_bytes
from gradsel.policies import Columns, Global, PerLayer, PerNeuron, Rows, equal_budget
from gradsel.selecting import select
from gradsel.selection import Selection, freeze
from gradsel_kernels import __version__

__all__ = [
    "AttachReport",
    "Columns",
    "Criterion",
    "Global",
    "MaskedAdam",
    "MaskedAdamW",
    "PerLayer",
    "PerNeuron",
    "Rows",
    "Selection",
    "SupConLoss",
    "__version__",
    "attach",
    "detach",
    "equal_budget",
    "freeze",
    "random_scores",
    "select",
    "state_bytes",
    "sync",
    "trainable_parameters",
]
