"""Device code of the fused first step: a program selects in its rows and then updates what it has selected.

What it has read of the gradient is then still in the cache, so the gradient is read from memory once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradsel_kernels.triton import topk
from gradsel_kernels.triton.adam_device import (
    _COLUMNS,
    _COMPENSATION,
    _EXP_AVG,
    _EXP_AVG_SQ,
    _FIELDS,
    _FIRST_TILE,
    _GRAD,
    _GRAD_COL,
    _GRAD_ROW,
    _INDEX,
    _INDEX_WIDTH,
    _MAX_EXP_AVG_SQ,
    _ORIGINAL,
    _ROWS,
    _VALUES,
    _WEIGHT,
    _WEIGHT_COL,
    _WEIGHT_ROW,
    COMPENSATED,
    STOCHASTIC,
    _allowed,
    _vector,
    adam_math,
    round_stochastically,
)
from gradsel_kernels.triton.common import convert, div_rn

_topk_rounds, _topk_bisect = topk._topk_rounds, topk._topk_bisect
_topk_stream_rounds, _topk_stream_bisect = topk._topk_stream_rounds, topk._topk_stream_bisect


@triton.jit
def first_step(
    table, tiles, masks, corrections, keys, grad_scale, found_inf, lerp_weight: tl.float64, beta2: tl.float64,
    square_weight: tl.float64, eps: tl.float64, decay: tl.float64, pull: tl.float64,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MOMENT: tl.constexpr,
    STREAMED: tl.constexpr, KP: tl.constexpr, KEY_BITS: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT_STRIDE: tl.constexpr, WITH_BITS: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_ORIGINAL: tl.constexpr, ROUNDING: tl.constexpr,
    AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One block of rows of a tensor. ``masks`` has the address of each tensor's packed mask.

    KP: of top-K in rounds; 0: by bisection. ALIGNED: rows begin at addresses divisible by 16, and so does the number of
    columns.
    """
    tile = tl.program_id(0)
    tensor = tl.load(tiles + tile)
    item = table + tensor * _FIELDS
    block = tile - tl.load(item + _FIRST_TILE)
    rows = tl.load(item + _ROWS)
    k = tl.load(item + _INDEX_WIDTH).to(tl.int32)
    n = tl.load(item + _COLUMNS).to(tl.int32)
    grad_row = tl.load(item + _GRAD_ROW)
    grad_col = tl.load(item + _GRAD_COL)
    if ALIGNED:
        n = n // 16 * 16  # unchanged; the compiler learns that no vector straddles the end
        grad_row = tl.multiple_of(grad_row, 16)
    grad = _vector(item, _GRAD, GRAD, ALIGNED)
    cols = tl.load(item + _INDEX).to(tl.pointer_type(tl.int32))
    bits = cols
    if WITH_BITS:
        bits = tl.load(masks + tensor).to(tl.pointer_type(tl.int32))
    if KP > 0:
        if STREAMED:
            _topk_stream_rounds(
                grad, cols, bits, grad_row, grad_col, rows, n, k, ROWS, COLS, KP, UNIT_STRIDE, WITH_BITS, block
            )
        else:
            _topk_rounds(
                grad, cols, bits, grad_row, grad_col, rows, n, k, ROWS, COLS, KP, UNIT_STRIDE, WITH_BITS, block
            )
    else:
        if STREAMED:
            _topk_stream_bisect(
                grad, cols, bits, grad_row, grad_col, rows, n, k, ROWS, COLS, KEY_BITS, UNIT_STRIDE, WITH_BITS, block
            )
        else:
            _topk_bisect(
                grad, cols, bits, grad_row, grad_col, rows, n, k, ROWS, COLS, CHUNK, KEY_BITS, UNIT_STRIDE, WITH_BITS,
                block,
            )  # fmt: skip
    tl.debug_barrier()  # the columns that other threads of the program have stored are read next

    first_row = block * ROWS
    total = (tl.minimum(first_row + ROWS, rows) - first_row).to(tl.int32) * k
    for start in range(0, total, ENTRIES):
        lane = start + tl.arange(0, ENTRIES)
        valid = lane < total
        row = first_row + (lane // k).to(tl.int64)
        entry = first_row * k + lane
        col = tl.load(cols + entry, mask=valid, other=0).to(tl.int64)
        _first_update(
            item, tensor, corrections, keys, grad_scale, found_inf, entry,
            row * tl.load(item + _WEIGHT_ROW) + col * tl.load(item + _WEIGHT_COL),
            row * tl.load(item + _GRAD_ROW) + col * tl.load(item + _GRAD_COL), valid,
            lerp_weight, beta2, square_weight, eps, decay, pull,
            WEIGHT, GRAD, STATE, MOMENT, HAS_VALUES, HAS_ORIGINAL, ROUNDING, AMSGRAD, DECAY, MAXIMIZE, ANCHOR, ENTRIES,
        )  # fmt: skip


@triton.jit
def _first_update(
    item, tensor, corrections, keys, grad_scale, found_inf, entry, weight_offset, grad_offset, valid,
    lerp_weight, beta2, square_weight, eps, decay, pull,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MOMENT: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_ORIGINAL: tl.constexpr, ROUNDING: tl.constexpr,
    AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Makes the states of selected entries, and updates them unless gradients overflowed."""
    zero = tl.zeros([ENTRIES], STATE)
    weight = _vector(item, _WEIGHT, WEIGHT, False) + weight_offset
    p = convert(tl.load(weight, mask=valid), STATE)
    g = convert(tl.load(_vector(item, _GRAD, GRAD, False) + grad_offset, mask=valid), STATE)
    if grad_scale is not None:
        g = div_rn(g, tl.load(grad_scale).to(STATE))
    original = p
    if ROUNDING == COMPENSATED:
        p += zero  # the compensation so far, which turns -0.0 into 0.0
    new_p, m, v, v_max = adam_math(
        p, g, zero, zero, zero, original,
        tl.load(corrections + 2 * tensor).to(STATE), tl.load(corrections + 2 * tensor + 1).to(STATE),
        tl.full((), lerp_weight, STATE), tl.full((), beta2, STATE), tl.full((), square_weight, STATE),
        tl.full((), eps, STATE), tl.full((), decay, STATE), tl.full((), pull, STATE), AMSGRAD, DECAY, MAXIMIZE, ANCHOR,
    )  # fmt: skip

    inside = _allowed(valid, found_inf)
    tl.store(_vector(item, _EXP_AVG, MOMENT, False) + entry, convert(tl.where(inside, m, zero), MOMENT), mask=valid)
    tl.store(_vector(item, _EXP_AVG_SQ, MOMENT, False) + entry, convert(tl.where(inside, v, zero), MOMENT), mask=valid)
    if AMSGRAD:
        largest = convert(tl.where(inside, v_max, zero), MOMENT)
        tl.store(_vector(item, _MAX_EXP_AVG_SQ, MOMENT, False) + entry, largest, mask=valid)
    if HAS_ORIGINAL:
        tl.store(_vector(item, _ORIGINAL, STATE, False) + entry, original, mask=valid)
    if HAS_VALUES:
        tl.store(_vector(item, _VALUES, STATE, False) + entry, tl.where(inside, new_p, original), mask=valid)
    if ROUNDING == STOCHASTIC:
        new_p = round_stochastically(new_p, entry, tl.load(keys + tensor), WEIGHT)
    rounded = convert(new_p, WEIGHT)
    tl.store(weight, rounded, mask=inside)
    if ROUNDING == COMPENSATED:
        lost = new_p - convert(rounded, STATE)
        lost = tl.where(inside & (tl.abs(lost) < float("inf")), lost, zero)
        tl.store(_vector(item, _COMPENSATION, WEIGHT, False) + entry, convert(lost, WEIGHT), mask=valid)
