"""attach() and detach(): layers that compute the selected gradients and no others."""

from gradsel.nn.attaching import AttachReport, attach, sync, trainable_parameters
from gradsel.nn.detaching import detach
from gradsel.nn.merging import MergeReport, merge

__all__ = [
    "AttachReport",
    "MergeReport",
    "attach",
    "detach",
    "merge",
    "sync",
    "trainable_parameters",
]
