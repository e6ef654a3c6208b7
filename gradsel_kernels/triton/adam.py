"""Masked Adam: the selected entries of any number of tensors in one launch.

Tensors that agree in everything that shapes the compiled code form a bucket, which has a table in device memory. Two
kernels do its step: one counts the steps and computes bias corrections, the other updates the tiles.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gradsel_kernels._checks import Layout, sum_dtype
from gradsel_kernels.adam_call import AdamCall, AdamOptions
from gradsel_kernels.adam_item import CODES, AdamItem
from gradsel_kernels.adam_table import AdamTable, table_of
from gradsel_kernels.triton import adam_device as device_code
from gradsel_kernels.triton import device_tables
from gradsel_kernels.triton.common import TRITON_DTYPES, on_device
from gradsel_kernels.triton.device_tables import ENTRIES, Prepared

WARPS = 4
#: Tensors whose steps one program counts.
STEPS = 32
#: Fusion is off so that rounding happens where torch rounds; fused products are written out. The last option keeps
#: square roots of subnormal moments.
COMPILER_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False, "enable_reflect_ftz": False}

_DTYPES = {code: dtype for dtype, code in CODES.items()}


class _Bucket(NamedTuple):
    """What tensors must share to be updated by one launch: everything that shapes the compiled code."""

    weight_dtype: torch.dtype | None
    grad_dtype: torch.dtype
    moment_dtype: torch.dtype
    index_dtype: torch.dtype
    step_dtype: torch.dtype
    layout: int
    compact: bool
    linear: bool
    has_values: bool
    rounding: int
    aligned: bool


def _is_contiguous(item: AdamItem, row_stride: int, col_stride: int) -> bool:
    return (item.cols == 1 or col_stride == 1) and (item.rows == 1 or row_stride == item.cols)


def _bucket(item: AdamItem, anchored: bool) -> _Bucket:
    has_weight = item.weight != 0
    layout = item.layout if has_weight else int(Layout.ALL)  # without a weight it does not matter where entries lie
    compact = not item.grad_is_dense
    linear = not has_weight or _is_contiguous(item, item.weight_row_stride, item.weight_col_stride)
    linear = linear and (compact or _is_contiguous(item, item.grad_row_stride, item.grad_col_stride))
    rounding = device_code.STOCHASTIC if item.stochastic else device_code.TO_NEAREST
    if item.compensation:
        rounding = device_code.COMPENSATED
    addresses = [item.weight, item.values, item.grad, item.exp_avg, item.exp_avg_sq, item.max_exp_avg_sq]
    addresses += [item.compensation, item.original if anchored else 0, item.index if layout != Layout.ALL else 0]
    return _Bucket(
        weight_dtype=_DTYPES[item.weight_dtype] if has_weight else None,
        grad_dtype=_DTYPES[item.grad_dtype],
        moment_dtype=_DTYPES[item.state_dtype],
        index_dtype=torch.int64 if layout == Layout.FLAT and item.index_is_64 else torch.int32,
        step_dtype=_DTYPES[item.step_dtype],
        layout=layout,
        compact=compact or (layout == Layout.ALL and linear),  # there, mask order is memory order
        linear=linear and layout in (Layout.ALL, Layout.FLAT),
        has_values=item.values != 0,
        rounding=rounding.value,
        aligned=all(number % 16 == 0 for number in (item.nnz, *addresses)),
    )


def _bucket_tables(table: AdamTable, anchored: bool) -> list[tuple[_Bucket, list[int]]]:
    """The buckets of a table, each with the numbers of its tensors."""
    buckets: dict[_Bucket, list[int]] = {}
    for i, item in enumerate(table.items):
        buckets.setdefault(_bucket(item, anchored), []).append(i)
    return list(buckets.items())


def masked_adam_(call: AdamCall, options: AdamOptions) -> None:
    """One step on every tensor: two launches a bucket. Never waits for the device.

    Describing 150 tensors takes the host longer than their step takes the device, so what was prepared for the same
    addresses on the same stream is used again. A step like one that has been made can be captured in a CUDA graph, see
    :mod:`gradsel_kernels.triton.device_tables`.
    """
    adam_of_table(table_of(call), call, options)


def adam_of_table(table: AdamTable, call: AdamCall, options: AdamOptions) -> None:
    anchored = bool(call.originals) and options.anchor != 0
    scalars, flags = _scalars(options, anchored)
    flags["AMSGRAD"] = bool(call.max_exp_avg_sqs)
    given = tuple(optional is not None for optional in (call.grad_scale, call.found_inf, call.rates))
    with on_device(call.exp_avgs[0]):
        buckets = partial(_bucket_tables, table, anchored)
        for prepared in device_tables.of(table, (*flags.values(), *given), buckets, call.exp_avgs[0]):
            _launch(prepared, call, options, scalars, flags)


def _scalars(options: AdamOptions, anchored: bool) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The numbers that the kernels take, and the options that are compiled into them."""
    decay_mode, decay = device_code.NO_DECAY, 0.0
    if options.weight_decay != 0:
        decay_mode, decay = device_code.L2_DECAY, options.weight_decay
        if options.decoupled_weight_decay:
            decay_mode, decay = device_code.DECOUPLED_DECAY, 1 - options.lr * options.weight_decay
    anchor_mode, pull = device_code.NO_ANCHOR, 0.0
    if anchored:
        l1 = options.anchor_l1
        anchor_mode, pull = device_code.L1_ANCHOR if l1 else device_code.L2_ANCHOR, _pull(options)
        if options.anchor_decoupled:
            anchor_mode = device_code.DECOUPLED_L1_ANCHOR if l1 else device_code.DECOUPLED_L2_ANCHOR
            pull *= options.lr
    flags = {"DECAY": decay_mode.value, "MAXIMIZE": options.maximize, "ANCHOR": anchor_mode.value}
    return (1 - options.beta1, options.beta2, 1 - options.beta2, options.eps, decay, pull), flags


def _pull(options: AdamOptions) -> float:
    """The factor of the gap to the original, or for L1 of its sign, in the gradient."""
    return options.anchor * (1 if options.anchor_l1 else 2)


def advance(
    table: Tensor,
    tensors: int,
    step_dtype: torch.dtype,
    rounding: int,
    call: AdamCall,
    options: AdamOptions,
    flags: dict[str, Any],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Counts the steps of a table's tensors.

    Returns:
        Their bias corrections; for stochastic rounding the keys of its numbers; and with rates the numbers that the
        kernel of the step would otherwise be given.
    """
    corrections = torch.empty((tensors, 2), dtype=torch.float64, device=table.device)
    stochastic = rounding == device_code.STOCHASTIC.value
    keys = torch.empty(tensors, dtype=torch.int64, device=table.device) if stochastic else None
    scalars = None
    decoupled_decay = decoupled_pull = False
    decay = pull = 0.0
    if call.rates is not None:
        scalars = torch.empty(5, dtype=torch.float64, device=table.device)
        decay, pull = options.weight_decay, _pull(options)
        decoupled_decay = flags["DECAY"] == device_code.DECOUPLED_DECAY.value
        decoupled_pull = options.anchor_decoupled
    device_code.advance[(triton.cdiv(tensors, STEPS),)](
        table, corrections, keys, call.found_inf, call.rates, scalars, tensors,
        options.lr, options.beta1, options.beta2, decay, pull,
        STEP=TRITON_DTYPES[step_dtype], TENSORS=STEPS, DECOUPLED_DECAY=decoupled_decay, DECOUPLED_PULL=decoupled_pull,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return corrections, keys, scalars


def _launch(
    prepared: Prepared, call: AdamCall, options: AdamOptions, scalars: tuple[float, ...], flags: dict[str, Any]
) -> None:
    bucket, members, table, tiles = prepared
    corrections, keys, from_rates = advance(
        table, len(members), bucket.step_dtype, bucket.rounding, call, options, flags
    )
    total = tiles.numel()
    if not total:
        return
    state_dtype = sum_dtype(bucket.moment_dtype)
    flags = {
        "WEIGHT": TRITON_DTYPES[bucket.weight_dtype or state_dtype],
        "GRAD": TRITON_DTYPES[bucket.grad_dtype],
        "STATE": TRITON_DTYPES[state_dtype],
        "MOMENT": TRITON_DTYPES[bucket.moment_dtype],
        "COMPACT": bucket.compact,
        "HAS_VALUES": bucket.has_values,
        "ROUNDING": bucket.rounding,
        "ALIGNED": bucket.aligned,
        **flags,
        **COMPILER_OPTIONS,
    }
    pointers = (table, tiles, corrections, keys, call.grad_scale, call.found_inf, from_rates)
    device_code.step[(total,)](
        *pointers, *scalars,
        INDEX=TRITON_DTYPES[bucket.index_dtype], LAYOUT=bucket.layout, LINEAR=bucket.linear,
        HAS_WEIGHT=bucket.weight_dtype is not None, ENTRIES=ENTRIES, **flags,
    )  # fmt: skip
