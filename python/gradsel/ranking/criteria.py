"""Criteria: what makes an entry worth training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsel.dtypes import trained_dtype

#: Scores of one weight, from its neuron view and that of its summed gradient, both [rows, cols]. The largest magnitudes
#: are selected.
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """What makes an entry worth training. A plain function ``(weight, grad) -> score`` also serves as one.

    Attributes:
        name: its name in the selection's notes.
        score: the scores [rows, cols] of one weight, from its neuron view and that of its summed gradient.
        needs_gradient: whether gradients need to be computed.
        each_batch: maps the gradient of one batch, which it may change in place, to what is summed over batches. None:
            the gradient itself is summed, with its sign.
        squared: scores are squares already, so the scores of rows and columns are plain sums of them.
        even: the squared scores of every input have the same sum, so whole inputs cannot be ranked by them.
        reset: called before each selection, so that all selections start from the same state.
        by_entry: the score of an entry depends on nothing but its weight and gradient.
    """

    name: str
    score: Callable[[Tensor, Tensor | None], Tensor]
    needs_gradient: bool = True
    each_batch: Callable[[Tensor], Tensor] | None = None
    squared: bool = False
    even: bool = False
    reset: Callable[[], object] = lambda: None
    by_entry: bool = False


def random_scores(seed: int = 0) -> Criterion:
    """Random scores, the baseline of GPS, Tab. 6; the same ones for the same seed."""
    generator = torch.Generator("cpu")

    def score(weight: Tensor, grad: Tensor | None) -> Tensor:
        return torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.device)

    return Criterion(f"random, seed {seed}", score, needs_gradient=False, reset=lambda: generator.manual_seed(seed))


def relative_to_input(grad: Tensor) -> Tensor:
    """Gradients [rows, cols], each over the root mean square of those of its input; 0 where all of these are 0.

    The gradient of a weight is that of its neuron times its input, so a few inputs that are large for every sample hold
    the largest gradients of most neurons, whatever these need. Adam, which divides by the gradient, makes nothing of
    their size. Relative to the input, the choice is between neurons' own gradients.
    """
    wide = grad.to(trained_dtype(grad))
    scale = wide.abs().amax(0)  # first, so that no square overflows or vanishes
    scaled = wide / torch.where(scale > 0, scale, 1)
    return scaled / scaled.square().mean(0).sqrt_().clamp_(min=torch.finfo(wide.dtype).tiny)


_CRITERIA: dict[str, Callable[[], Criterion]] = {
    "gradient": lambda: Criterion("gradient", lambda weight, grad: _given(grad), by_entry=True),
    "absolute": lambda: Criterion("absolute", lambda weight, grad: _given(grad), each_batch=torch.abs_, by_entry=True),
    "fisher": lambda: Criterion(
        "fisher", lambda weight, grad: _given(grad), each_batch=torch.square_, squared=True, by_entry=True
    ),
    "relative": lambda: Criterion("relative", lambda weight, grad: relative_to_input(_given(grad)), even=True),
    "snip": lambda: Criterion("snip", lambda weight, grad: weight * _given(grad), by_entry=True),
    "magnitude": lambda: Criterion("magnitude", lambda weight, grad: weight, needs_gradient=False, by_entry=True),
    "random": random_scores,
}


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None  # select() only ranks parameters with a gradient
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
