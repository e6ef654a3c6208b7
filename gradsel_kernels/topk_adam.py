"""The first step of a selection: top-K of every row, packed mask, new moments and masked Adam in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsel_kernels import _checks
from gradsel_kernels._adam_checks import split_seeds
from gradsel_kernels._ops import OPS

_ROUNDINGS = ("nearest", "master", "kahan", "stochastic")
_HALVES = (torch.bfloat16, torch.float16)


class FirstStep(NamedTuple):
    """What :func:`topk_masked_adam_` returns; entry i of each list belongs to tensor i. All tensors are new.

    Attributes:
        cols: int32 [rows, min(k, n)], ascending in each row, as from :func:`topk_rows`.
        bits: int32 [rows, ceil(n / 32)], as from :func:`topk_rows_bits`; empty if they were not asked for.
        exp_avgs, exp_avg_sqs: the moments of the selected entries, in the shape of ``cols``.
        max_exp_avg_sqs: their running maxima; empty without ``amsgrad``.
        originals: the selected entries before the step; empty without an anchor, unless they were asked for.
        values: the master copies of weights in 16 bits with ``low_precision="master"``; None for other weights.
        compensations: what rounding has lost, with ``low_precision="kahan"``, likewise.
        steps: one float32 each, 1 (0 after a step that ``found_inf`` has skipped).
    """

    cols: list[Tensor]
    bits: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    originals: list[Tensor]
    values: list[Tensor | None]
    compensations: list[Tensor | None]
    steps: list[Tensor]


def topk_masked_adam_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    k: int | Sequence[int],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    amsgrad: bool = False,
    anchor: float = 0.0,
    anchor_l1: bool = False,
    anchor_decoupled: bool = False,
    low_precision: str = "nearest",
    seeds: Sequence[int | None] | None = None,
    moment_dtype: torch.dtype | None = None,
    bits: bool = True,
    originals: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> FirstStep:
    """Selects the ``k`` largest gradients of every row and does their first step of Adam, reading gradients once.

    The result is, to the bit, that of :func:`topk_rows_bits` and then :func:`masked_adam_` with these columns, moments
    of zero and a step count of zero, for any number of tensors on one device in one call.

    Args:
        weights: neuron views [rows, n] with any strides. Only selected entries change.
        grads: their dense gradients [rows, n], ranked as they are: magnitudes before ``grad_scale``, as in
            :func:`topk_rows`.
        k: entries to select in each row, at least 1; one number for all tensors, or one for each.
        lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, grad_scale: as in :func:`masked_adam_`.
        amsgrad: keep the running maxima of second moments.
        anchor, anchor_l1, anchor_decoupled: as in :func:`masked_adam_`; the originals are the entries before the step.
        low_precision: how weights in bfloat16 and float16 keep what rounding loses: ``"nearest"`` does not,
            ``"master"`` makes ``values``, ``"kahan"`` ``compensations``, and ``"stochastic"`` rounds by ``seeds``.
        seeds: for ``"stochastic"``, one int64 for each tensor, or None for those that are not in 16 bits.
        moment_dtype: None for float32 (float64 for float64 weights), or ``torch.bfloat16``, which float64 weights
            ignore.
        bits: also return packed masks.
        originals: also return the selected entries before the step, as is done with an anchor.
        found_inf: one float32: if it is not 0, entries are selected but not updated; moments and steps are 0.

    Raises:
        TypeError, ValueError: tensors or options that do not fit together; the message names the tensor's number.
        RuntimeError: a weight requires grad, outside ``torch.no_grad()``.
    """
    if low_precision not in _ROUNDINGS:
        raise ValueError(f"low_precision must be one of {', '.join(_ROUNDINGS)}, got {low_precision!r}")
    if moment_dtype not in (None, torch.float32, torch.bfloat16):
        raise TypeError(f"moment_dtype must be None, torch.float32 or torch.bfloat16, got {moment_dtype}")
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        raise RuntimeError("topk_masked_adam_ writes to tensors that require grad; call it under torch.no_grad()")
    counts = [k] * len(weights) if isinstance(k, int) else list(k)
    for name, given in (("grads", grads), ("k", counts)):
        if len(given) != len(weights):
            raise ValueError(f"{name} has {len(given)} entries, but weights has {len(weights)}; pass one for each")
    for i, (weight, grad, count) in enumerate(zip(weights, grads, counts, strict=True)):
        _check(i, weight, grad, count)
    first = _made(weights, counts, amsgrad, originals or anchor != 0, low_precision, moment_dtype, bits)
    if not weights:
        return first
    stochastic = low_precision == "stochastic"
    if stochastic and (seeds is None or len(seeds) != len(weights)):
        raise ValueError(
            f"low_precision='stochastic' needs seeds, one for each of the {len(weights)} tensors, got "
            f"{'none' if seeds is None else len(seeds)}"
        )
    numbers, seeded = split_seeds((seeds or ()) if stochastic else ())
    nothing = weights[0].new_empty(0)
    has_values = any(value is not None for value in first.values)
    has_compensations = any(compensation is not None for compensation in first.compensations)
    OPS.topk_masked_adam_.default(
        list(weights),
        [nothing if value is None else value for value in first.values] if has_values else [],
        list(grads),
        first.exp_avgs,
        first.exp_avg_sqs,
        first.max_exp_avg_sqs,
        first.originals,
        first.steps,
        first.cols,
        first.bits,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        anchor=anchor,
        anchor_l1=anchor_l1,
        anchor_decoupled=anchor_decoupled,
        grad_scale=grad_scale,
        found_inf=found_inf,
        seeds=numbers,
        stochastic=seeded,
        compensations=[nothing if lost is None else lost for lost in first.compensations]
        if has_compensations
        else None,
    )
    return first


def _check(i: int, weight: Tensor, grad: Tensor, k: int) -> None:
    """What has to hold before anything can be allocated; the operator checks the rest."""
    try:
        _checks.topk_rows(grad, k)
        _checks.neuron_matrix(weight)
        if grad.shape != weight.shape:
            raise ValueError(f"grad must have the shape of the weight {list(weight.shape)}, got {list(grad.shape)}")
    except (TypeError, ValueError) as error:
        raise type(error)(f"tensor {i}: {error}") from None


def _made(
    weights: Sequence[Tensor],
    counts: Sequence[int],
    amsgrad: bool,
    originals: bool,
    low_precision: str,
    moment_dtype: torch.dtype | None,
    bits: bool,
) -> FirstStep:
    """The tensors that the operator fills."""
    first = FirstStep([], [], [], [], [], [], [], [], [])
    for weight, k in zip(weights, counts, strict=True):
        rows, n = weight.shape
        shape = (rows, min(k, n))
        dtype = _checks.sum_dtype(weight.dtype)
        moments = dtype if moment_dtype is None or dtype is torch.float64 else moment_dtype
        half = weight.dtype in _HALVES
        first.cols.append(weight.new_empty(shape, dtype=torch.int32))
        if bits:
            first.bits.append(weight.new_empty((rows, _checks.words(n)), dtype=torch.int32))
        first.exp_avgs.append(weight.new_empty(shape, dtype=moments))
        first.exp_avg_sqs.append(weight.new_empty(shape, dtype=moments))
        if amsgrad:
            first.max_exp_avg_sqs.append(weight.new_empty(shape, dtype=moments))
        if originals:
            first.originals.append(weight.new_empty(shape, dtype=dtype))
        first.values.append(weight.new_empty(shape, dtype=dtype) if half and low_precision == "master" else None)
        first.compensations.append(weight.new_empty(shape) if half and low_precision == "kahan" else None)
        first.steps.append(weight.new_empty((), dtype=torch.float32))
    return first
