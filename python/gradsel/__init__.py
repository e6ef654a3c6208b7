"""Sparse fine-tuning: choose the weights that matter, and train only those.

:func:`select` finds them from gradients, :func:`attach` makes a model compute no other gradients, and
:class:`MaskedAdam` trains them. The kernels are in :mod:`gradsel_kernels`.
"""

from gradsel.attaching import AttachReport, attach, detach, sync, trainable_parameters
from gradsel.losses import SupConLoss
from gradsel.optim import MaskedAdam, MaskedAdamW, state_bytes
from gradsel.selection import Columns, Criterion, PerNeuron, Rows, Selection, freeze, random_scores, select
from gradsel_kernels import __version__

__all__ = [
    "AttachReport",
    "Columns",
    "Criterion",
    "MaskedAdam",
    "MaskedAdamW",
    "PerNeuron",
    "Rows",
    "Selection",
    "SupConLoss",
    "__version__",
    "attach",
    "detach",
    "freeze",
    "random_scores",
    "select",
    "state_bytes",
    "sync",
    "trainable_parameters",
]
