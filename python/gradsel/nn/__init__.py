"""attach() and detach(): layers that compute the selected gradients and no others."""

from gradsel.nn.attaching import AttachReport, attach, detach, sync, trainable_parameters

__all__ = [
    "AttachReport",
    "attach",
    "detach",
    "sync",
    "trainable_parameters",
]
