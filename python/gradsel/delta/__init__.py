"""The difference that fine-tuning makes: created, saved, applied, reverted and exchanged."""

from gradsel.delta.bank import TaskBank
from gradsel.delta.delta import Delta, load_delta, save_delta
from gradsel.delta.exporting import export
from gradsel.delta.pretrained import save_beside
from gradsel.nn.saving import BESIDE

__all__ = [
    "Delta",
    "TaskBank",
    "export",
    "load_delta",
    "save_delta",
]

BESIDE.append(save_beside)
