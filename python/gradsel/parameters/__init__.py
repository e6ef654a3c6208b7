"""What the parameters of a model are called, and which of them are ranked, trained whole or frozen."""

from gradsel.parameters.rules import ranked_sizes

__all__ = [
    "ranked_sizes",
]
