"""Bytes of masks in the ways in which they may be kept (GRFT, Fig. 1), from the shapes of a model."""

from __future__ import annotations

import torch

from gradsel.errors import RunError
from gradsel.experiments.papers.selections import Measured
from gradsel.methods import method
from gradsel.methods.ranked import Ranked
from gradsel.papers.counting import meta_model
from gradsel.parameters.rules import HEAD, ranked_sizes
from gradsel.ranking.policies import Columns, Rows
from gradsel.training.config import Config
from gradsel.training.models import load_model
from gradsel.training.presets import MODELS

#: Outputs of the head, which is in no mask.
_CLASSES = 2


def bytes_of_masks(config: Config) -> Measured:
    """Bytes of all masks of a model together, by the way in which they are kept.

    ``dense float32`` is what GPS's published code keeps; ``dense bool`` a byte for each weight; ``bitmask`` a bit, in
    words of 32 for each row; ``indices`` the columns of every row (GPS), or the numbers of rows or columns (GRFT), in
    16 bits where they suffice. ``entries`` counts what is selected.

    Raises:
        RunError: the method does not rank weights.
    """
    how = method(config.method.name, **config.method.options)
    if not isinstance(how, Ranked):
        raise RunError(f"method.name: {how.name} has no mask")
    sizes = list(_sizes(config).values())
    policy = how.policy(sizes)
    per_matrix = isinstance(policy, (Rows, Columns))
    indices = 0
    for rows, cols in sizes:
        end = rows if isinstance(policy, Rows) else cols
        numbers = min(policy.k, end) if per_matrix else policy.budget([(rows, cols)])  # type: ignore[attr-defined]
        indices += numbers * (2 if end <= 2**16 else 4)
    entries = sum(rows * cols for rows, cols in sizes)
    values = {
        "entries": policy.budget(sizes),
        "dense float32": 4 * entries,
        "dense bool": entries,
        "bitmask": sum(4 * rows * -(-cols // 32) for rows, cols in sizes),
        "indices": indices,
    }
    return Measured({name: float(value) for name, value in values.items()}, {})


def _sizes(config: Config) -> dict[str, tuple[int, int]]:
    known = next((key for key, name in MODELS.items() if name == config.model.name), None)
    if known is not None and config.model.weights != "none":
        return ranked_sizes(meta_model(known, _CLASSES), head=HEAD)
    with torch.device("meta"):
        loaded = load_model(config.model, [str(n) for n in range(_CLASSES)], "images")
    return ranked_sizes(loaded.model, **loaded.rules)
