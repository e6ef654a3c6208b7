"""The fused first step: two launches for all tensors that share their compiled code, as in ``adam``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gradsel_kernels._checks import sum_dtype
from gradsel_kernels.adam_call import AdamCall, AdamOptions
from gradsel_kernels.adam_item import ITEM_WORDS, AdamItem
from gradsel_kernels.adam_table import AdamTable
from gradsel_kernels.triton import adam
from gradsel_kernels.triton import adam_device as device_code
from gradsel_kernels.triton.common import TRITON_DTYPES, on_device
from gradsel_kernels.triton.device_tables import lines_and_tiles, refuse_capture, to_device
from gradsel_kernels.triton.topk import (
    BYTES_IN_REGISTERS,
    RANKED_AT_ONCE,
    SMALL_K,
    register_config,
    stream_config,
    stream_options,
)
from gradsel_kernels.triton.topk_adam_device import first_step

#: Selected entries that are updated at a time; a program has few.
ENTRIES = 128


class Config(NamedTuple):
    """How rows of one size are searched: what tensors of one launch share, besides their dtypes."""

    streamed: bool
    kp: int
    key_bits: int
    rows: int
    cols: int
    warps: int
    registers: int | None


def config(n: int, k: int, itemsize: int, transposed: bool) -> Config:
    """As :func:`gradsel_kernels.triton.topk.topk` chooses."""
    small = k <= SMALL_K
    streamed = transposed or n * max(4, itemsize) > BYTES_IN_REGISTERS
    rows, cols, warps = stream_config(itemsize, transposed) if streamed else register_config(n, itemsize)
    registers = stream_options(small, transposed).get("maxnreg") if streamed else None
    kp = (1 if k == 1 else SMALL_K) if small else 0
    return Config(streamed, kp, 8 * itemsize - 1, rows, cols, warps, registers)


class _Bucket(NamedTuple):
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    moment_dtype: torch.dtype
    config: Config
    unit_stride: bool
    aligned: bool
    has_values: bool
    rounding: int


def _bucket(call: AdamCall, item: AdamItem, i: int) -> _Bucket:
    grad, k = call.grads[i], call.indices[i].shape[1]
    rows, n = grad.shape
    transposed = grad.stride(0) == 1 and grad.stride(1) > 1 and rows > 1
    rounding = device_code.STOCHASTIC if item.stochastic else device_code.TO_NEAREST
    if item.compensation:
        rounding = device_code.COMPENSATED
    return _Bucket(
        call.weights[i].dtype,
        grad.dtype,
        call.exp_avgs[i].dtype,
        config(n, k, grad.element_size(), transposed),
        grad.stride(1) == 1 or n == 1,
        all(number % 16 == 0 for number in (item.grad, grad.stride(0), n)),
        item.values != 0,
        rounding.value,
    )


def topk_masked_adam_(call: AdamCall, options: AdamOptions, bits: list[Tensor]) -> None:
    """Selects, makes states and updates. Never waits for the device."""
    device = call.weights[0].device
    refuse_capture("topk_masked_adam_", device)
    table = AdamTable(call)
    buckets: dict[_Bucket, list[int]] = {}
    for i, item in enumerate(table.items):
        buckets.setdefault(_bucket(call, item, i), []).append(i)
    words = torch.frombuffer(table.words, dtype=torch.int64).view(-1, ITEM_WORDS)
    scalars, flags = adam._scalars(options, bool(call.originals) and options.anchor != 0)
    with on_device(call.weights[0]):
        torch._foreach_zero_(call.steps)
        for bucket, members in buckets.items():
            if bits and bucket.config.streamed and bucket.config.kp:  # single bits are set there
                torch._foreach_zero_([bits[i] for i in members])
            blocks = [
                triton.cdiv(call.grads[i].shape[0], bucket.config.rows) * (call.indices[i].numel() > 0) for i in members
            ]
            lines, tiles = lines_and_tiles(words[members], blocks)
            masks = torch.tensor([bits[i].data_ptr() for i in members] if bits else [0], dtype=torch.int64)
            _launch(
                bucket, len(members), to_device(lines, device), to_device(tiles, device), to_device(masks, device),
                call, options, scalars,
                {**flags, "AMSGRAD": bool(call.max_exp_avg_sqs), "HAS_ORIGINAL": bool(call.originals),
                 "WITH_BITS": bool(bits)},
            )  # fmt: skip


def _launch(
    bucket: _Bucket,
    tensors: int,
    table: Tensor,
    tiles: Tensor,
    masks: Tensor,
    call: AdamCall,
    options: AdamOptions,
    scalars: tuple[float, ...],
    flags: dict[str, Any],
) -> None:
    corrections, keys, _ = adam.advance(table, tensors, torch.float32, bucket.rounding, call, options, flags)
    if not tiles.numel():
        return
    search = bucket.config
    first_step[(tiles.numel(),)](
        table, tiles, masks, corrections, keys, call.grad_scale, call.found_inf, *scalars,
        WEIGHT=TRITON_DTYPES[bucket.weight_dtype], GRAD=TRITON_DTYPES[bucket.grad_dtype],
        STATE=TRITON_DTYPES[sum_dtype(bucket.moment_dtype)], MOMENT=TRITON_DTYPES[bucket.moment_dtype],
        STREAMED=search.streamed, KP=search.kp, KEY_BITS=search.key_bits, CHUNK=RANKED_AT_ONCE,
        ROWS=search.rows, COLS=search.cols, UNIT_STRIDE=bucket.unit_stride, ALIGNED=bucket.aligned,
        HAS_VALUES=bucket.has_values, ROUNDING=bucket.rounding, ENTRIES=ENTRIES,
        **flags, **{**adam.COMPILER_OPTIONS, "num_warps": search.warps, "maxnreg": search.registers},
    )  # fmt: skip
