"""The settings of both papers as data, and their numbers of trained parameters."""

from gradsel.papers import presets
from gradsel.papers.counting import trainable_count

__all__ = [
    "presets",
    "trainable_count",
]
