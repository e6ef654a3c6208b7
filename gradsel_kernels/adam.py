"""Masked Adam: one call that updates the selected entries of any number of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
) -> None:
    """One step of Adam or AdamW on the selected entries of every tensor, in place.

    Entry i of each argument belongs to tensor i. All of them are on one device.

    Args:
        weights: dense weights: a neuron view [rows, n] with any strides, or a contiguous tensor whose memory holds
            the rows one after the other. Only selected entries change. None if there are only ``values``.
        grads: the gradient, either dense (the shape of the weight) or compact, in mask order (the shape of
            ``exp_avgs``, contiguous). Where the two shapes are the same, it is dense.
        exp_avgs, exp_avg_sqs: first and second moments of the selected entries, in mask order, contiguous, float32
            (float64 for float64 weights): [rows, k] for ``COLS``, [nnz] for ``BITS`` and ``FLAT``, any for ``ALL``.
        steps: one float each, the number of steps done so far; counted up here.
        lr, beta1, beta2, eps, weight_decay: as in :class:`torch.optim.Adam`.
        decoupled_weight_decay: weight decay as in AdamW instead of an L2 term in the gradient. Either moves selected
            entries only.
        maximize: ascend instead of descend.
        indices: which entries are selected, in the form that ``layouts`` says; distinct. None: all of them.
        layouts: a :class:`Layout` for each tensor: ``ALL``, ``COLS`` (int32 [rows, k]), ``BITS`` (int32
            [rows, ceil(n / 32)]) or ``FLAT`` (int32 or int64 [nnz], row * n + column). None: all ``ALL``.
        values: the selected entries as trained, float32 (float64), in mask order: master copies for weights in
            bfloat16 or float16, or a compact parameter of its own. They are updated, and the weight, if there is one,
            receives them rounded to its dtype. None: the weight is read, updated in float32 and rounded back.
        max_exp_avg_sqs: running maxima of the second moments; given, the step is AMSGrad's.

    Raises:
        TypeError, ValueError: tensors that do not fit together; the message names the tensor's number.
        IndexError: an index out of range; nothing has changed. On CUDA tensors indices are trusted, as in
            :func:`gather_rows`, and an entry out of range is skipped.
    """
    if not weights:
        return
    given = [t for t in (*exp_avgs, *grads, *weights, *(values or ())) if t is not None]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, *(values or ()))):
        raise RuntimeError("masked_adam_ writes to tensors that require grad; call it under torch.no_grad()")
    nothing = _nothing(given[0] if given else torch.empty(0))
    if indices is None:
        indices = [None] * len(weights)
    if layouts is None:
        layouts = [Layout.ALL] * len(weights)
    OPS.masked_adam_.default(
        [nothing if weight is None else weight for weight in weights],
        [] if values is None else [nothing if value is None else value for value in values],
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [] if max_exp_avg_sqs is None else list(max_exp_avg_sqs),
        list(steps),
        [nothing if index is None else index for index in indices],
        [int(layout) for layout in layouts],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )


_empty: dict[torch.device, Tensor] = {}


def _nothing(like: Tensor) -> Tensor:
    """An empty tensor on the same device: the same one in every call, by which backends know a repetition."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return like.new_empty(0)  # a traced graph must not hold on to a real tensor
    if like.device not in _empty:
        _empty[like.device] = like.new_empty(0)
    return _empty[like.device]
