"""The result of select(): a mask for every parameter, its file format, and comparisons of selections."""

from gradsel.selection.selection import Selection, freeze

__all__ = [
    "Selection",
    "freeze",
]
