"""Criteria: what makes an entry worth training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Scores of one weight from its neuron view and the neuron view of its accumulated gradient, both [rows, cols]. The
#: largest magnitudes are selected.
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """What makes an entry worth training. A plain function ``(weight, grad) -> score`` is one, too.

    Attributes:
        name: what the selection's notes call it.
        score: the scores [rows, cols] of one weight, from its neuron view and that of its summed gradient.
        needs_gradient: whether gradients are computed at all.
        each_batch: what is summed over batches, from the gradient of one, which it may change in place. None: the
            gradient itself, with its sign.
        squared: scores are squares already; rows and columns are then judged by plain sums of them.
        reset: called before a selection, so that each one starts alike.
    """

    name: str
    score: Callable[[Tensor, Tensor | None], Tensor]
    needs_gradient: bool = True
    each_batch: Callable[[Tensor], Tensor] | None = None
    squared: bool = False
    reset: Callable[[], object] = lambda: None


def random_scores(seed: int = 0) -> Criterion:
    """Random entries, the baseline of GPS Tab. 6; the same for the same seed."""
    generator = torch.Generator("cpu")

    def score(weight: Tensor, grad: Tensor | None) -> Tensor:
        return torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.device)

    return Criterion(f"random, seed {seed}", score, needs_gradient=False, reset=lambda: generator.manual_seed(seed))


_CRITERIA: dict[str, Callable[[], Criterion]] = {
    "gradient": lambda: Criterion("gradient", lambda weight, grad: _given(grad)),
    "absolute": lambda: Criterion("absolute", lambda weight, grad: _given(grad), each_batch=torch.abs_),
    "fisher": lambda: Criterion("fisher", lambda weight, grad: _given(grad), each_batch=torch.square_, squared=True),
    "snip": lambda: Criterion("snip", lambda weight, grad: weight * _given(grad)),
    "magnitude": lambda: Criterion("magnitude", lambda weight, grad: weight, needs_gradient=False),
    "random": random_scores,
}


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None  # select() ranks only what has a gradient
    return grad


def criterion_of(criterion: str | Criterion | Score) -> Criterion:
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        function = criterion
        name = getattr(function, "__name__", type(function).__name__)
        return Criterion(name, lambda weight, grad: function(weight.clone(), _given(grad)))
    if criterion not in _CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; choose one of {', '.join(_CRITERIA)}, or pass a function")
    return _CRITERIA[criterion]()
