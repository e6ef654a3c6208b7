"""The parameters of a model: their names, blocks and fingerprints, and which are ranked, trained whole or frozen."""

from gradsel.parameters.rules import ranked_sizes

__all__ = [
    "ranked_sizes",
]
