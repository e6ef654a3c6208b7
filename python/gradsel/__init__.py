"""Sparse fine-tuning: choose the weights that matter, and train only those.

:func:`select` finds them from gradients, :class:`MaskedAdam` trains them. The kernels are in :mod:`gradsel_kernels`.
"""

from gradsel.losses import SupConLoss
from gradsel.optim import MaskedAdam, MaskedAdamW, state_bytes
from gradsel.selection import Criterion, PerNeuron, Selection, freeze, random_scores, select
from gradsel_kernels import __version__

__all__ = [
    "Criterion",
    "MaskedAdam",
    "MaskedAdamW",
    "PerNeuron",
    "Selection",
    "SupConLoss",
    "__version__",
    "freeze",
    "random_scores",
    "select",
    "state_bytes",
]
