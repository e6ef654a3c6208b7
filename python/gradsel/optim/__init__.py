"""MaskedAdam: Adam for the selected entries of a model."""

from gradsel.optim.adamw import MaskedAdamW
from gradsel.optim.anchoring import anchored_groups
from gradsel.optim.optimizer import MaskedAdam
from gradsel.optim.state import state_bytes

__all__ = [
    "MaskedAdam",
    "MaskedAdamW",
    "anchored_groups",
    "state_bytes",
]
