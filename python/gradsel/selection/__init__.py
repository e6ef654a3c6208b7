"""The result of select(): a mask for every parameter, its file, and how selections compare."""

from gradsel.selection.selection import Selection, freeze

__all__ = [
    "Selection",
    "freeze",
]
