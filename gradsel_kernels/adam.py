"""Masked Adam: one call that updates the selected entries of any number of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsel_kernels._adam_checks import split_seeds
from gradsel_kernels._checks import Layout
from gradsel_kernels._ops import OPS


def masked_adam_(
    weights: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    indices: Sequence[Tensor | None] | None = None,
    layouts: Sequence[Layout | int] | None = None,
    values: Sequence[Tensor | None] | None = None,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    originals: Sequence[Tensor] | None = None,
    anchor: float = 0.0,
    anchor_l1: bool = False,
    anchor_decoupled: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int | None] | None = None,
    compensations: Sequence[Tensor | None] | None = None,
    numbers: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """One step of Adam or AdamW on the selected entries of every tensor, in place.

    Entry i of each argument belongs to tensor i. All of them are on one device.

    Args:
        weights: dense weights: a neuron view [rows, n] with any strides, or a contiguous tensor whose memory holds
            the rows one after the other. Only selected entries change. None if there are only ``values``.
        grads: the gradient, either dense (the shape of the weight) or compact, in mask order (the shape of
            ``exp_avgs``, contiguous). Where the two shapes are the same, it is dense.
        exp_avgs, exp_avg_sqs: first and second moments of the selected entries, in mask order, contiguous, float32
            (float64 for float64 weights): [rows, k] for ``COLS``, [nnz] for ``FLAT``, any for ``ALL``.
            bfloat16 instead of float32 halves them: the step is computed in float32, and they are stored rounded to
            nearest even, which keeps second moments from falling if 1 - beta2 is below 2^-9. The moments of one
            tensor have one dtype.
        steps: one float each, the number of steps done so far; incremented here, so no tensor may appear twice.
        lr, beta1, beta2, eps, weight_decay: as in :class:`torch.optim.Adam`.
        decoupled_weight_decay: weight decay as in AdamW instead of an L2 term in the gradient. Both move only the
            selected entries.
        maximize: ascend instead of descend.
        indices: which entries are selected, in the form that ``layouts`` says; distinct. None: all of them.
        layouts: a :class:`Layout` for each tensor: ``ALL``, ``COLS`` (int32 [rows, k]) or ``FLAT`` (int32 or
            int64 [nnz], row * n + column). None: all ``ALL``.
        values: the selected entries as trained, float32 (float64), in mask order: master copies for weights in
            bfloat16 or float16, or a compact parameter in its own right. They are updated, and the weight, if there is
            one, receives them rounded to its dtype. None: the weight is read, updated in float32 and rounded back to
            nearest even, unless ``seeds`` or ``compensations`` say otherwise.
        max_exp_avg_sqs: running maxima of the second moments; given, the step is AMSGrad's.
        originals: the values that the anchor pulls the selected entries towards, like ``exp_avgs`` in mask order and
            shape, float32 (float64); not written. None: no anchor.
        anchor: strength of the pull towards ``originals``, of the regularised loss of GRFT ("Gradient-based and
            Regularized Fine-Tuning", under review 2026, Alg. 1 line 8): ``anchor * ||w - original||_2^2`` over the
            selected entries is added to the loss, so ``2 * anchor * (w - original)`` to the gradient, also with
            ``maximize``. 0: no anchor.
        anchor_l1: ``anchor * ||w - original||_1`` instead, of gradient ``anchor * sign(w - original)``.
        anchor_decoupled: the pull moves the entries themselves before Adam does and bypasses its moments, as decoupled
            weight decay does: ``w -= 2 * lr * anchor * (w - original)``, or for L1 a step of ``lr * anchor`` that ends
            at the original (soft thresholding). Weight decay of either kind comes first: the anchor sees what
            decoupled weight decay has left.
        grad_scale: one float32, from ``torch.amp.GradScaler``: gradients are first divided by it, as torch's fused
            optimizers do: in float32 (float64 for float64 states), rounded once to nearest even. Unlike torch's, the
            gradients in memory stay scaled. Read on the device, without synchronisation. None: no division.
        found_inf: one float32, from the same scaler: if it is not 0, nothing changes, not even the step count. Also
            read on the device. None: the step is always done.
        seeds: for weights in bfloat16 or float16 without ``values``, one int64 for each tensor, or None for those that
            are rounded to nearest. Given, the new float32 value x is rounded stochastically: to one of its two
            neighbours in the weight's dtype, to the upper one with probability (x - lower) / (upper - lower), so that
            steps much smaller than a unit in the last place take effect sometimes instead of never (Gupta et al. 2015,
            "Deep Learning with Limited Numerical Precision", sec. 3). The random numbers are a hash of the seed, the
            step number and the entry's number in mask order: the same on every backend and thread count, and after a
            restart. Values that the dtype holds, infinities and NaN stay. Above the largest finite number the next
            neighbour is infinity, in place of the next number (65536 in float16); anything beyond it becomes infinity.
        compensations: for the same weights, what rounding has lost, like ``exp_avgs`` in mask order and shape, in
            the weight's dtype, zero at first: one tensor each, or None. Given, weight + compensation, summed in
            float32, is the parameter p of the step; then the weight is p rounded to nearest even and the compensation
            p - weight, rounded too (compensated summation, Kahan 1965; for weights in Zamirai et al. 2020, "Revisiting
            BFloat16 Training"). It is 0 where the weight is not finite. A weight changed in between keeps its
            compensation. In float16, whose numbers are multiples of 2^-24, it adds few digits to small weights.
        numbers: float64 [6] on the CPU: lr, beta1, beta2, eps, weight_decay and anchor, in place of the arguments. They
            are read at the call. To compiled code, a float argument is a constant, and a tensor is not.
        rates: float64 [3] on the device of the other tensors: lr, beta1 and beta2, in place of the arguments. On GPUs
            the kernels read them, so nothing waits, and each replay of a CUDA graph uses what they hold by then.

    Raises:
        TypeError, ValueError: tensors that do not fit together; the message names the tensor's number. A tensor with
            two of values, seed and compensation, or a seed or compensation for a weight that is not in 16 bits.
        IndexError: an index out of range; nothing has changed. On CUDA tensors indices are trusted, as in
            :func:`gather_rows`, and an entry out of range is skipped.
    """
    if not weights:
        return
    if anchor and originals is None:
        raise ValueError(f"anchor={anchor} needs originals, the values to pull towards, one tensor for each weight")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, *(values or ()))):
        raise RuntimeError("masked_adam_ writes to tensors that require grad; call it under torch.no_grad()")
    tensors, keywords = operands(
        weights, grads, exp_avgs, exp_avg_sqs, steps, indices=indices, layouts=layouts, values=values,
        max_exp_avg_sqs=max_exp_avg_sqs, originals=originals, seeds=seeds, compensations=compensations,
    )  # fmt: skip
    OPS.masked_adam_.default(
        *tensors,
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
        numbers=numbers,
        rates=rates,
        **keywords,
    )


def operands(
    weights: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    indices: Sequence[Tensor | None] | None = None,
    layouts: Sequence[Layout | int] | None = None,
    values: Sequence[Tensor | None] | None = None,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    originals: Sequence[Tensor] | None = None,
    seeds: Sequence[int | None] | None = None,
    compensations: Sequence[Tensor | None] | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """The lists of :func:`masked_adam_` as the operator takes them: by position, and by keyword.

    Empty tensors stand for entries that are None, and empty lists for missing ones.
    """
    given = [t for t in (*exp_avgs, *grads, *weights, *(values or ())) if t is not None]
    nothing = _nothing(given[0] if given else torch.empty(0))
    numbers, stochastic = split_seeds(seeds or ())
    if indices is None:
        indices = [None] * len(weights)
    if layouts is None:
        layouts = [Layout.ALL] * len(weights)
    tensors = [
        [nothing if weight is None else weight for weight in weights],
        [] if values is None else [nothing if value is None else value for value in values],
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [] if max_exp_avg_sqs is None else list(max_exp_avg_sqs),
        [] if originals is None else list(originals),
        list(steps),
        [nothing if index is None else index for index in indices],
        [int(layout) for layout in layouts],
    ]
    return tensors, {
        "seeds": numbers,
        "stochastic": stochastic,
        "compensations": None if compensations is None else [nothing if t is None else t for t in compensations],
    }


_empty: dict[torch.device, Tensor] = {}


def _nothing(like: Tensor) -> Tensor:
    """An empty tensor on the same device; the same one in every call, so that backends recognise a repeated call."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return like.new_empty(0)  # a traced graph must not hold on to a real tensor
    if like.device not in _empty:
        _empty[like.device] = like.new_empty(0)
    return _empty[like.device]
