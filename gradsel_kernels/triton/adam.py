"""Masked Adam: the selected entries of any number of tensors in one launch.

Tensors that agree in everything that shapes the compiled code form a bucket, which has a table in device memory. Two
kernels do its step: one counts the steps and computes bias corrections, the other updates the tiles.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gradsel_kernels._checks import Layout, sum_dtype
from gradsel_kernels._streams import is_capturing, stream_of
from gradsel_kernels.adam_call import AdamCall, AdamOptions
from gradsel_kernels.adam_item import CODES, ITEM_WORDS, AdamItem
from gradsel_kernels.adam_table import AdamTable, table_of
from gradsel_kernels.triton import adam_device as device_code
from gradsel_kernels.triton.common import TRITON_DTYPES, on_device

#: Entries of one tile, 4 a thread: vectors of 16 bytes, and so few registers that occupancy hides scattered reads.
ENTRIES = 512
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


class _Prepared(NamedTuple):
    """A bucket ready to launch: its table, the tensor of every tile (int32), and the number of tensors."""

    bucket: _Bucket
    table: Tensor
    tiles: Tensor
    tensors: int


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


def _to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy for which the host does not wait; torch keeps the pinned source until it is done."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def _prepare(table: AdamTable, anchored: bool, device: torch.device) -> list[_Prepared]:
    buckets: dict[_Bucket, list[int]] = {}
    for i, item in enumerate(table.items):
        buckets.setdefault(_bucket(item, anchored), []).append(i)
    words = torch.frombuffer(table.words, dtype=torch.int64).view(-1, ITEM_WORDS)
    prepared = []
    for bucket, members in buckets.items():
        counts = [triton.cdiv(table.items[i].nnz, ENTRIES) for i in members]
        first_tiles = list(itertools.accumulate(counts, initial=0))[:-1]
        lines = torch.cat([words[members], torch.tensor(first_tiles).unsqueeze(1)], dim=1)
        tiles = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
        prepared.append(_Prepared(bucket, _to_device(lines, device), _to_device(tiles, device), len(members)))
    return prepared


def masked_adam_(call: AdamCall, options: AdamOptions) -> None:
    """One step on every tensor: two launches a bucket. Never waits for the device.

    Describing 150 tensors takes the host longer than their step takes the device, so what was prepared for the same
    addresses on the same stream is used again.
    """
    adam_of_table(table_of(call), call, options)


def adam_of_table(table: AdamTable, call: AdamCall, options: AdamOptions) -> None:
    device = call.exp_avgs[0].device
    if is_capturing(device):
        raise RuntimeError(
            "Triton's masked_adam_ cannot be captured in a CUDA graph: the addresses of its tensors are copied from "
            "the host. Capture forward and backward and step outside the graph, or use the kernel in CUDA C++, which "
            "can be captured: gradsel_kernels.use_backend('cuda')"
        )
    anchored = bool(call.originals) and options.anchor != 0
    scalars, flags = _scalars(options, anchored)
    flags["AMSGRAD"] = bool(call.max_exp_avg_sqs)
    with on_device(call.exp_avgs[0]):
        key = (stream_of(device), anchored, table.words.tobytes())
        for prepared in table.prepared(key, lambda: _prepare(table, anchored, device)):
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
        anchor_mode, pull = device_code.L1_ANCHOR if l1 else device_code.L2_ANCHOR, options.anchor * (1 if l1 else 2)
        if options.anchor_decoupled:
            anchor_mode = device_code.DECOUPLED_L1_ANCHOR if l1 else device_code.DECOUPLED_L2_ANCHOR
            pull *= options.lr
    flags = {"DECAY": decay_mode.value, "MAXIMIZE": options.maximize, "ANCHOR": anchor_mode.value}
    return (1 - options.beta1, options.beta2, 1 - options.beta2, options.eps, decay, pull), flags


def advance(
    table: Tensor, tensors: int, step_dtype: torch.dtype, rounding: int, call: AdamCall, options: AdamOptions
) -> tuple[Tensor, Tensor | None]:
    """Counts the steps of a table's tensors; bias corrections, and for stochastic rounding the keys of its numbers."""
    corrections = torch.empty((tensors, 2), dtype=torch.float64, device=table.device)
    stochastic = rounding == device_code.STOCHASTIC.value
    keys = torch.empty(tensors, dtype=torch.int64, device=table.device) if stochastic else None
    device_code.advance[(triton.cdiv(tensors, STEPS),)](
        table, corrections, keys, call.found_inf, tensors, options.lr, options.beta1, options.beta2,
        STEP=TRITON_DTYPES[step_dtype], TENSORS=STEPS, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return corrections, keys


def _launch(
    prepared: _Prepared, call: AdamCall, options: AdamOptions, scalars: tuple[float, ...], flags: dict[str, Any]
) -> None:
    bucket, table, tiles, tensors = prepared
    corrections, keys = advance(table, tensors, bucket.step_dtype, bucket.rounding, call, options)
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
    pointers = (table, tiles, corrections, keys, call.grad_scale, call.found_inf)
    device_code.step[(total,)](
        *pointers, *scalars,
        INDEX=TRITON_DTYPES[bucket.index_dtype], LAYOUT=bucket.layout, LINEAR=bucket.linear,
        HAS_WEIGHT=bucket.weight_dtype is not None, ENTRIES=ENTRIES, **flags,
    )  # fmt: skip
