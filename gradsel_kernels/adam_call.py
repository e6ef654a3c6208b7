"""One call of ``masked_adam_`` as the checks and every backend take it: a record of its tensors and one of its options.

The operator's schema lists them one by one; :func:`records` is the only place that turns one form into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradsel_kernels._checks import Layout


class AdamCall(NamedTuple):
    """The tensors of a call, documented in :func:`gradsel_kernels.masked_adam_`. Entry i of each list is tensor i's.

    A list that the call does without is empty, and so is the tensor that stands for a missing entry.
    """

    weights: list[Tensor]
    values: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    originals: list[Tensor]
    steps: list[Tensor]
    indices: list[Tensor]
    layouts: list[int]
    seeds: Sequence[int]
    stochastic: Sequence[bool]  #: which seeds apply
    compensations: Sequence[Tensor]
    grad_scale: Tensor | None
    found_inf: Tensor | None
    rates: Tensor | None  #: of :data:`RATES`

    def states(self) -> list[Tensor]:
        """All that belongs to the optimizer, the first moment of the first tensor first."""
        return [
            *self.exp_avgs,
            *self.exp_avg_sqs,
            *self.max_exp_avg_sqs,
            *self.originals,
            *self.steps,
            *self.indices,
            *self.compensations,
        ]


class AdamOptions(NamedTuple):
    """The hyperparameters of a call, in the order in which the native module takes them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool
    anchor: float
    anchor_l1: bool
    anchor_decoupled: bool


#: The options that a tensor can hold instead: one on the CPU, and one on the device, which kernels read.
NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "anchor")
RATES = ("lr", "beta1", "beta2")


def records(
    *lists: Any,
    seeds: Sequence[int] = (),
    stochastic: Sequence[bool] = (),
    compensations: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rates: Tensor | None = None,
    **options: Any,
) -> tuple[AdamCall, AdamOptions]:
    """The records of a call whose arguments are the operator's."""
    fields = (*lists, seeds, stochastic, compensations or (), grad_scale, found_inf, rates)
    return AdamCall._make(fields), AdamOptions(**options)


def read_rates(call: AdamCall, options: AdamOptions) -> AdamOptions:
    """The options with the rates of a call in their place, for backends that compute with them on the host."""
    return options if call.rates is None else options._replace(**dict(zip(RATES, call.rates.tolist(), strict=True)))


def entry(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    """Entry i of a list that may be empty and whose entries may be missing."""
    return tensors[i] if tensors and tensors[i].numel() else None


def grad_is_dense(grad: Tensor, weight: Tensor) -> bool:
    """Whether a gradient is dense: it has the weight's shape. Otherwise it is compact, in mask order."""
    return grad.shape == weight.shape


def neuron_view(tensor: Tensor, index: Tensor, layout: int) -> Tensor:
    """A dense tensor as [rows, cols]: itself if it is 2-D, otherwise its memory divided into the rows of the mask."""
    if tensor.ndim == 2:
        return tensor
    return tensor.view(index.shape[0] if layout == Layout.COLS else 1, -1)
