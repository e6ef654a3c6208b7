"""A vision transformer of a few parameters."""

from __future__ import annotations

from gradsel.papers.vit import VisionTransformer


def small(classes: int = 5) -> VisionTransformer:
    return VisionTransformer(8, 2, 1, dim=8, depth=2, heads=2, num_classes=classes)
