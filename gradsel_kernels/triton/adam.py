"""Masked Adam: the selected entries of any number of tensors in one launch.

Tensors that agree in the dtypes and options that shape the code form a bucket. A bucket has a table on the device,
one line of addresses, strides and sizes for each tensor, and a list that names the tensor of every tile. Two kernels
then do the step: one counts the steps up and turns them into bias corrections, one updates the tiles. Packed
bitmasks need two more to find the entries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsel_kernels._checks import Layout, grad_is_dense, sum_dtype
from gradsel_kernels.backends.adam_table import is_capturing, stream_of, table_of
from gradsel_kernels.triton.common import TRITON_DTYPES, convert, div_rn, fma, on_device, popcount, sqrt_rn

_ALL = tl.constexpr(int(Layout.ALL))
_COLS = tl.constexpr(int(Layout.COLS))

# Columns of a bucket's table, int64 each; addresses first. Strides are in elements.
_WEIGHT = tl.constexpr(0)
_VALUES = tl.constexpr(1)
_GRAD = tl.constexpr(2)
_EXP_AVG = tl.constexpr(3)
_EXP_AVG_SQ = tl.constexpr(4)
_MAX_EXP_AVG_SQ = tl.constexpr(5)
_ORIGINAL = tl.constexpr(6)
_INDEX = tl.constexpr(7)
_COMPENSATION = tl.constexpr(8)
_STEP = tl.constexpr(9)
_SEED = tl.constexpr(10)
_NNZ = tl.constexpr(11)
_ROWS = tl.constexpr(12)
_COLUMNS = tl.constexpr(13)
_ROW_LENGTH = tl.constexpr(14)  # of the index: k (COLS) or words (BITS)
_WEIGHT_ROW = tl.constexpr(15)
_WEIGHT_COL = tl.constexpr(16)
_GRAD_ROW = tl.constexpr(17)
_GRAD_COL = tl.constexpr(18)
_FIRST_TILE = tl.constexpr(19)
_FIELDS = tl.constexpr(20)

_NO_DECAY = tl.constexpr(0)
_L2_DECAY = tl.constexpr(1)
_DECOUPLED_DECAY = tl.constexpr(2)

_NO_ANCHOR = tl.constexpr(0)
_L2_ANCHOR = tl.constexpr(1)
_L1_ANCHOR = tl.constexpr(2)
_DECOUPLED_L2_ANCHOR = tl.constexpr(3)
_DECOUPLED_L1_ANCHOR = tl.constexpr(4)

# How the weight receives its new value.
_TO_NEAREST = tl.constexpr(0)
_STOCHASTIC = tl.constexpr(1)
_COMPENSATED = tl.constexpr(2)

#: Entries of one tile, 4 a thread: vectors of 16 bytes, and registers few enough to hide scattered reads by occupancy.
ENTRIES = 512
#: Words of one tile of a packed mask, and how many of its entries are updated at a time.
TILE_WORDS = 256
BATCH = 512
WARPS = 4
#: Tensors whose steps one program counts up.
STEPS = 32
#: Fusion is off so that rounding happens where torch rounds; fused products are written out. The last option keeps
#: square roots of subnormal moments.
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False, "enable_reflect_ftz": False}


# Device ---------------------------------------------------------------------------------------------------------


@triton.jit
def pull_math(p, g, original, pull, ANCHOR: tl.constexpr):
    """The anchor's share in gradient or parameter, as in the specification.

    ``pull`` is what the gap, or its sign (L1), is multiplied with: in the gradient (coupled) or the step (decoupled).
    """
    gap = p - original
    sign = (gap > 0).to(gap.dtype) - (gap < 0).to(gap.dtype)  # 0 for NaN, as torch.sign
    if ANCHOR == _L2_ANCHOR:
        g = fma(gap, pull, g)
    if ANCHOR == _L1_ANCHOR:
        g = fma(sign, pull, g)
    if ANCHOR == _DECOUPLED_L2_ANCHOR:
        p = fma(gap, -pull, p)
    if ANCHOR == _DECOUPLED_L1_ANCHOR:
        p = tl.where(tl.abs(gap) <= pull, original, fma(sign, -pull, p))
    return p, g


@triton.jit
def adam_math(
    p, g, m, v, v_max, original, step_size, root_of_correction, lerp_weight, beta2, square_weight, eps, decay, pull,
    AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """One step in the order of torch's single-tensor Adam: each fma is one of torch's, every other result is rounded.

    ``decay`` is the weight decay (L2) or what it leaves of the parameter, 1 - lr * weight_decay (decoupled). ``pull``
    is :func:`pull_math`'s.
    """
    if MAXIMIZE:
        g = -g
    if DECAY == _L2_DECAY:
        g = fma(decay, p, g)
    if DECAY == _DECOUPLED_DECAY:
        p = p * decay
    if ANCHOR != _NO_ANCHOR:
        p, g = pull_math(p, g, original, pull, ANCHOR)
    gap = g - m
    m = tl.where(tl.abs(lerp_weight) < 0.5, fma(lerp_weight, gap, m), fma(lerp_weight - 1.0, gap, g))
    v = fma(square_weight * g, g, beta2 * v)
    second_moment = v
    if AMSGRAD:
        v_max = tl.where((v > v_max) | (v != v), v, v_max)  # NaN on either side stays
        second_moment = v_max
    denominator = div_rn(sqrt_rn(second_moment), root_of_correction) + eps
    p = p + div_rn(-step_size * m, denominator)
    return p, m, v, v_max


@triton.jit
def mix(x):
    """The specification's bijection of uint32."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _random_keys(seed, t):
    """The specification's keys of seeds and steps, both int64: the first in the low 32 bits, the second in the high."""
    low = mix(seed.to(tl.uint32))
    high = mix((seed >> 32).to(tl.uint32) ^ low)
    first = mix(t.to(tl.uint32) ^ low)
    second = mix((-1 - t).to(tl.uint32) ^ high)
    return first.to(tl.int64) | (second.to(tl.int64) << 32)


@triton.jit
def round_stochastically(x, entry, keys, DTYPE: tl.constexpr):
    """float32 moved to one of its neighbours in bfloat16 or float16, as in the specification, to the bit."""
    word = mix(mix(entry.to(tl.uint32) ^ keys.to(tl.uint32)) ^ (entry >> 32).to(tl.uint32) ^ (keys >> 32).to(tl.uint32))
    bits = x.to(tl.uint32, bitcast=True)
    DROPPED: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 13  # noqa: SIM300
    rounded = ((bits >> DROPPED) + (word < (bits << (32 - DROPPED))).to(tl.uint32)) << DROPPED
    if DTYPE == tl.float16:  # noqa: SIM300
        # Below 2**-14 the numbers are the multiples of 2**-24; every product and difference here is exact.
        small = tl.abs(x) < 6.103515625e-05
        multiple = tl.where(small, tl.abs(x), 0.0) * 16777216.0
        whole = multiple.to(tl.int32)
        fraction = ((multiple - whole.to(tl.float32)) * 4294967296.0).to(tl.uint32)
        tiny = (whole + (word < fraction).to(tl.int32)).to(tl.float32) * 5.9604644775390625e-08
        rounded = tl.where(small, tiny.to(tl.uint32, bitcast=True) | (bits & 0x80000000), rounded)
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # a NaN would carry into the sign


@triton.jit
def _product(a, a_low, b, b_low):
    """Product of two unevaluated sums of two doubles, as another such sum."""
    high = a * b
    low = fma(a, b, -high) + (a * b_low + a_low * b)
    total = high + low
    return total, low - (total - high)


@triton.jit
def _power(base, exponent):
    """base ** exponent for int64 exponents, correctly rounded but for the rarest cases.

    Near 1 the correction 1 - beta**t cancels: an error of one last place in the power would be thousands in the
    update of the first steps, so exp(t * log(beta)) in double precision is not enough for float64 states.
    """
    result = base * 0.0 + 1.0
    result_low = base * 0.0
    square = base
    square_low = base * 0.0
    while tl.max(exponent, axis=0) > 0:
        odd = (exponent & 1) == 1
        high, low = _product(result, result_low, square, square_low)
        result = tl.where(odd, high, result)
        result_low = tl.where(odd, low, result_low)
        square, square_low = _product(square, square_low, square, square_low)
        exponent = exponent >> 1
    return result


@triton.jit
def _allowed(valid, found_inf):
    """None of what is valid where gradients overflowed. There is no way to skip a launch without waiting for them."""
    if found_inf is not None:
        valid = tl.where(tl.load(found_inf) == 0, valid, False)  # the interpreter cannot & with a scalar
    return valid


@triton.jit(do_not_specialize=["count"])
def _advance(
    table, corrections, keys, found_inf, count, lr: tl.float64, beta1: tl.float64, beta2: tl.float64,
    STEP: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Counts the steps up and writes (step size, root of the second correction) of each tensor, in float64.

    Where there are ``keys``, also writes the random keys of the step.
    """
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    valid = _allowed(i < count, found_inf)
    address = tl.load(table + i * _FIELDS + _STEP, mask=valid, other=0).to(tl.pointer_type(STEP))
    step = tl.load(address, mask=valid, other=0.0) + 1.0
    tl.store(address, step, mask=valid)
    t = step.to(tl.int64)
    zero = tl.zeros([TENSORS], tl.float64)
    step_size = (zero + tl.full((), lr, tl.float64)) / (1.0 - _power(zero + tl.full((), beta1, tl.float64), t))
    root = tl.sqrt(1.0 - _power(zero + tl.full((), beta2, tl.float64), t))
    tl.store(corrections + 2 * i, step_size, mask=valid)
    tl.store(corrections + 2 * i + 1, root, mask=valid)
    if keys is not None:
        seed = tl.load(table + i * _FIELDS + _SEED, mask=valid, other=0)
        tl.store(keys + i, _random_keys(seed, t), mask=valid)


@triton.jit
def _vector(table, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a field of a tensor's line, as a pointer to a contiguous vector."""
    pointer = tl.load(table + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update(
    item, tensor, corrections, keys, grad_scale, entry, weight_offset, grad_offset, valid, inside,
    lerp_weight, beta2, square_weight, eps, decay, pull,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MOMENT: tl.constexpr, COMPACT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_VALUES: tl.constexpr, ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """Loads, updates and stores the entries of one tile: their number in mask order, their place in weight and grad.

    Computes in STATE; moments are stored as MOMENT.

    ``valid`` entries exist, those ``inside`` lie in the weight. State is read and written for all that exist, and gets
    back what it was where the place is outside: a mask that differs from lane to lane would forbid vector accesses.
    """
    exp_avg = _vector(item, _EXP_AVG, MOMENT, ALIGNED) + entry
    exp_avg_sq = _vector(item, _EXP_AVG_SQ, MOMENT, ALIGNED) + entry
    m = convert(tl.load(exp_avg, mask=valid, other=0.0), STATE)
    v = convert(tl.load(exp_avg_sq, mask=valid, other=0.0), STATE)
    v_max = v
    if AMSGRAD:
        max_exp_avg_sq = _vector(item, _MAX_EXP_AVG_SQ, MOMENT, ALIGNED) + entry
        v_max = convert(tl.load(max_exp_avg_sq, mask=valid, other=0.0), STATE)
    g = convert(tl.load(_vector(item, _GRAD, GRAD, ALIGNED) + grad_offset, mask=valid if COMPACT else inside), STATE)
    if grad_scale is not None:
        g = div_rn(g, tl.load(grad_scale).to(STATE))
    if HAS_WEIGHT:
        weight = _vector(item, _WEIGHT, WEIGHT, ALIGNED) + weight_offset
    if HAS_VALUES:
        values = _vector(item, _VALUES, STATE, ALIGNED) + entry
        p = tl.load(values, mask=valid, other=0.0)
    else:
        p = convert(tl.load(weight, mask=inside), STATE)
    if ROUNDING == _COMPENSATED:
        compensation = _vector(item, _COMPENSATION, WEIGHT, ALIGNED) + entry
        kept = tl.load(compensation, mask=valid, other=0.0)
        p += convert(kept, STATE)
    original = p
    if ANCHOR != _NO_ANCHOR:
        original = tl.load(_vector(item, _ORIGINAL, STATE, ALIGNED) + entry, mask=valid, other=0.0)

    new_p, new_m, new_v, new_v_max = adam_math(
        p, g, m, v, v_max, original,
        tl.load(corrections + 2 * tensor).to(STATE), tl.load(corrections + 2 * tensor + 1).to(STATE),
        tl.full((), lerp_weight, STATE), tl.full((), beta2, STATE), tl.full((), square_weight, STATE),
        tl.full((), eps, STATE), tl.full((), decay, STATE), tl.full((), pull, STATE), AMSGRAD, DECAY, MAXIMIZE, ANCHOR,
    )  # fmt: skip

    tl.store(exp_avg, convert(tl.where(inside, new_m, m), MOMENT), mask=valid)
    tl.store(exp_avg_sq, convert(tl.where(inside, new_v, v), MOMENT), mask=valid)
    if AMSGRAD:
        tl.store(max_exp_avg_sq, convert(tl.where(inside, new_v_max, v_max), MOMENT), mask=valid)
    if HAS_VALUES:
        tl.store(values, tl.where(inside, new_p, p), mask=valid)
    if ROUNDING == _STOCHASTIC:
        new_p = round_stochastically(new_p, entry, tl.load(keys + tensor), WEIGHT)
    if HAS_WEIGHT:
        rounded = convert(new_p, WEIGHT)
        tl.store(weight, rounded, mask=inside)
    if ROUNDING == _COMPENSATED:
        lost = new_p - convert(rounded, STATE)
        lost = convert(tl.where(tl.abs(lost) < float("inf"), lost, 0.0), WEIGHT)
        tl.store(compensation, tl.where(inside, lost, kept), mask=valid)


@triton.jit
def _step(
    table, tiles, corrections, keys, grad_scale, found_inf, lerp_weight: tl.float64, beta2: tl.float64,
    square_weight: tl.float64, eps: tl.float64, decay: tl.float64, pull: tl.float64,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MOMENT: tl.constexpr, INDEX: tl.constexpr,
    LAYOUT: tl.constexpr, COMPACT: tl.constexpr, LINEAR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_VALUES: tl.constexpr, ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """One tile of a tensor whose entries are all, listed by column, or listed by flat index.

    COMPACT: the gradient lies in mask order. LINEAR: what is not compact lies at its flat index, row * cols + col.
    """
    tile = tl.program_id(0)
    tensor = tl.load(tiles + tile)
    item = table + tensor * _FIELDS
    first = (tile - tl.load(item + _FIRST_TILE)) * ENTRIES
    lane = tl.arange(0, ENTRIES)
    entry = first + lane
    nnz = tl.load(item + _NNZ)
    if ALIGNED:
        nnz = nnz // 16 * 16  # unchanged; the compiler learns that no vector straddles the end (a load takes no hint)
    valid = _allowed(entry < nnz, found_inf)
    inside = valid
    weight_offset = entry
    grad_offset = entry
    if LAYOUT == _COLS:
        # The first entry's row is divided out in 64 bits once, the lanes' in 32.
        k = tl.load(item + _ROW_LENGTH)
        lane_in_row = (first % k).to(tl.uint32) + lane.to(tl.uint32)
        row = first // k + (lane_in_row // k.to(tl.uint32)).to(tl.int64)
        col = tl.load(_vector(item, _INDEX, INDEX, ALIGNED) + entry, mask=valid, other=-1).to(tl.int64)
        inside = (col >= 0) & (col < tl.load(item + _COLUMNS))
    elif not (LAYOUT == _ALL and LINEAR):
        columns = tl.load(item + _COLUMNS)
        flat = entry
        if LAYOUT != _ALL:
            flat = tl.load(_vector(item, _INDEX, INDEX, ALIGNED) + entry, mask=valid, other=-1).to(tl.int64)
            inside = (flat >= 0) & (flat < tl.load(item + _ROWS) * columns)
        if LINEAR:
            weight_offset = flat
            if not COMPACT:
                grad_offset = flat
        else:
            row = flat // columns
            col = flat % columns
    if LAYOUT == _COLS or not LINEAR:
        weight_offset = row * tl.load(item + _WEIGHT_ROW) + col * tl.load(item + _WEIGHT_COL)
        if not COMPACT:
            grad_offset = row * tl.load(item + _GRAD_ROW) + col * tl.load(item + _GRAD_COL)
    _update(
        item, tensor, corrections, keys, grad_scale, entry, weight_offset, grad_offset, valid, inside,
        lerp_weight, beta2, square_weight, eps, decay, pull,
        WEIGHT, GRAD, STATE, MOMENT, COMPACT, HAS_WEIGHT, HAS_VALUES, ROUNDING, ALIGNED, AMSGRAD, DECAY, MAXIMIZE,
        ANCHOR,
    )  # fmt: skip


@triton.jit
def _tile_of_words(table, tiles, ALIGNED: tl.constexpr, WORDS: tl.constexpr):
    """The line of this program's tensor, and the number and contents of its words (rows one after the other)."""
    tile = tl.program_id(0)
    item = table + tl.load(tiles + tile) * _FIELDS
    first = (tile - tl.load(item + _FIRST_TILE)) * WORDS
    word = first + tl.arange(0, WORDS)
    valid = word < tl.load(item + _ROWS) * tl.load(item + _ROW_LENGTH)
    return item, first, tl.load(_vector(item, _INDEX, tl.int32, ALIGNED) + word, mask=valid, other=0)


@triton.jit
def _count_bits(table, tiles, counts, ALIGNED: tl.constexpr, WORDS: tl.constexpr):
    _, _, word = _tile_of_words(table, tiles, ALIGNED, WORDS)
    tl.store(counts + tl.program_id(0), tl.sum(popcount(word), axis=0))


@triton.jit
def _step_bits(
    table, tiles, corrections, keys, grad_scale, found_inf, starts, lerp_weight: tl.float64, beta2: tl.float64,
    square_weight: tl.float64, eps: tl.float64, decay: tl.float64, pull: tl.float64,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MOMENT: tl.constexpr, COMPACT: tl.constexpr,
    HAS_VALUES: tl.constexpr, ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
    WORDS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """One tile of a packed mask: lane i of a batch looks up the i-th set bit, so no lane idles on a zero.

    ``starts`` are the set bits in all tiles before each one.
    """
    item, first, word = _tile_of_words(table, tiles, ALIGNED, WORDS)
    tensor = tl.load(tiles + tl.program_id(0))
    count = popcount(word)
    end = tl.cumsum(count, axis=0)
    before = tl.load(starts + tl.program_id(0)) - tl.load(starts + tl.load(item + _FIRST_TILE))
    row_length = tl.load(item + _ROW_LENGTH)
    total = tl.sum(count, axis=0)
    for start in range(0, total, BATCH):
        rank = start + tl.arange(0, BATCH)
        # Binary search for the word: as many words end at or before the rank as lie before it.
        position = tl.zeros([BATCH], tl.int32)
        half = WORDS // 2
        while half > 0:
            passed = tl.gather(end, position + half - 1, axis=0) <= rank
            position += tl.where(passed, half, 0)
            half = half // 2
        within = rank - (tl.gather(end, position, axis=0) - tl.gather(count, position, axis=0))
        # And for the bit inside it, in halves of 16, 8, 4, 2 and 1.
        bits = tl.gather(word, position, axis=0).to(tl.uint32, bitcast=True)
        bit = tl.zeros([BATCH], tl.int32)
        for shift in tl.static_range(5):
            width = 16 >> shift
            low = popcount(((bits >> bit) & ((1 << width) - 1)).to(tl.int32, bitcast=True))
            above = low <= within
            within -= tl.where(above, low, 0)
            bit += tl.where(above, width, 0)
        flat_word = first + position
        row = flat_word // row_length
        col = (flat_word % row_length) * 32 + bit
        entry = before + rank
        valid = _allowed((rank < total) & (entry < tl.load(item + _NNZ)), found_inf)
        inside = valid & (col < tl.load(item + _COLUMNS))
        weight_offset = row * tl.load(item + _WEIGHT_ROW) + col * tl.load(item + _WEIGHT_COL)
        grad_offset = entry
        if not COMPACT:
            grad_offset = row * tl.load(item + _GRAD_ROW) + col * tl.load(item + _GRAD_COL)
        _update(
            item, tensor, corrections, keys, grad_scale, entry, weight_offset, grad_offset, valid, inside,
            lerp_weight, beta2, square_weight, eps, decay, pull,
            WEIGHT, GRAD, STATE, MOMENT, COMPACT, True, HAS_VALUES, ROUNDING, ALIGNED, AMSGRAD, DECAY, MAXIMIZE, ANCHOR,
        )  # fmt: skip


# Host -----------------------------------------------------------------------------------------------------------


class _Bucket(NamedTuple):
    """What tensors must share to be updated by one launch: everything that shapes the compiled code."""

    weight_dtype: torch.dtype | None
    grad_dtype: torch.dtype
    moment_dtype: torch.dtype
    index_dtype: torch.dtype | None
    step_dtype: torch.dtype
    layout: int
    compact: bool
    linear: bool
    has_values: bool
    rounding: int
    aligned: bool


def _neuron_view(tensor: Tensor, index: Tensor, layout: int) -> Tensor:
    """[rows, cols] of a dense tensor: itself if 2-D, else its memory cut into the mask's rows."""
    if tensor.ndim == 2:
        return tensor
    return tensor.view(index.shape[0] if layout in (Layout.COLS, Layout.BITS) else 1, -1)


def _describe(
    weight: Tensor, value: Tensor | None, grad: Tensor, state: tuple[Tensor, ...], original: Tensor | None,
    step: Tensor, index: Tensor, layout: int, seed: int | None, compensation: Tensor | None,
) -> tuple[_Bucket, list[int], int]:  # fmt: skip
    """One tensor's bucket, its line of the table without the first tile, and its number of tiles."""
    exp_avg = state[0]
    nnz = exp_avg.numel()
    has_values = value is not None and value.numel() > 0
    has_weight = weight.numel() > 0
    if not has_weight:
        layout = Layout.ALL  # where the entries lie in a weight does not matter
    compact = not grad_is_dense(grad, weight)
    rows, cols = 1, nnz
    strides: tuple[int, ...] = (nnz, 1)
    grad_strides: tuple[int, ...] = strides
    if nnz:
        if has_weight:
            view = _neuron_view(weight, index, layout)
            (rows, cols), strides = view.shape, view.stride()
        if not compact:
            view = _neuron_view(grad, index, layout)
            grad_strides = view.stride()
            if not has_weight:
                rows, cols = view.shape
    linear = (not has_weight or weight.is_contiguous()) and (compact or grad.is_contiguous())
    if layout == Layout.ALL and linear:
        compact = True  # mask order is memory order
    row_length = index.shape[1] if layout in (Layout.COLS, Layout.BITS) else 0

    pointers = [
        weight.data_ptr(),
        value.data_ptr() if value is not None else 0,
        grad.data_ptr(),
        exp_avg.data_ptr(),
        state[1].data_ptr(),
        state[2].data_ptr() if len(state) > 2 else 0,
        original.data_ptr() if original is not None else 0,
        index.data_ptr() if layout != Layout.ALL else 0,
        compensation.data_ptr() if compensation is not None else 0,
    ]
    rounding = _TO_NEAREST if seed is None else _STOCHASTIC
    if compensation is not None and compensation.numel():
        rounding = _COMPENSATED
    key = _Bucket(
        weight_dtype=weight.dtype if has_weight else None,
        grad_dtype=grad.dtype,
        moment_dtype=exp_avg.dtype,
        index_dtype=index.dtype if layout == Layout.FLAT else None,
        step_dtype=step.dtype,
        layout=int(layout),
        compact=compact,
        linear=linear and layout in (Layout.ALL, Layout.FLAT),
        has_values=has_values,
        rounding=rounding.value,
        aligned=all(number % 16 == 0 for number in (nnz, *pointers)),
    )
    line = [*pointers, step.data_ptr(), seed or 0, nnz, rows, cols, row_length, *strides, *grad_strides]
    work, size = (rows * row_length, TILE_WORDS) if layout == Layout.BITS else (nnz, ENTRIES)
    return key, line, triton.cdiv(work, size) if nnz else 0


def _to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for; torch keeps the pinned source until it is done."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


class _Launch(NamedTuple):
    """A bucket, ready to be launched."""

    bucket: _Bucket
    table: Tensor
    tiles: Tensor  # int32, the tensor of every tile
    tensors: int


def masked_adam_(
    weights: list[Tensor],
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    originals: list[Tensor],
    steps: list[Tensor],
    indices: list[Tensor],
    layouts: list[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    anchor: float,
    anchor_l1: bool,
    anchor_decoupled: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
    stochastic: Sequence[bool] = (),
    compensations: Sequence[Tensor] | None = None,
) -> None:
    """One step on every tensor: two launches a bucket, five if its masks are packed. Never waits for the device.

    Describing 150 tensors takes the host longer than the device takes for the step, so what was made for the same
    addresses on the same stream is used again.
    """
    args = (weights, values, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, originals, steps, indices, layouts)
    known = table_of(args, seeds, stochastic, compensations, grad_scale, found_inf)
    anchored = bool(originals) and anchor != 0
    device = exp_avgs[0].device
    stream = stream_of(device)
    if is_capturing(device):
        raise RuntimeError(
            "Triton's masked_adam_ cannot be captured in a CUDA graph: the addresses of its tensors are copied from "
            "the host. Capture forward and backward and step outside the graph, or use the kernel in CUDA C++, which "
            "can be captured: gradsel_kernels.use_backend('cuda')"
        )

    def prepare() -> list[_Launch]:
        buckets: dict[_Bucket, tuple[list[list[int]], list[int]]] = {}
        for i, weight in enumerate(weights):
            state = (exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1])
            value, original = values[i] if values else None, originals[i] if anchored else None
            key, line, tiles = _describe(
                weight, value, grads[i], state, original, steps[i], indices[i], layouts[i],
                seeds[i] if stochastic and stochastic[i] else None, compensations[i] if compensations else None,
            )  # fmt: skip
            lines, counts = buckets.setdefault(key, ([], []))
            lines.append(line)
            counts.append(tiles)
        return [_on_device(bucket, lines, counts, device) for bucket, (lines, counts) in buckets.items()]

    decay_mode, decay = _NO_DECAY, 0.0
    if weight_decay != 0:
        decay_mode, decay = _L2_DECAY, weight_decay
        if decoupled_weight_decay:
            decay_mode, decay = _DECOUPLED_DECAY, 1 - lr * weight_decay
    anchor_mode, pull = _NO_ANCHOR, 0.0
    if anchored:
        anchor_mode, pull = (_L1_ANCHOR, anchor) if anchor_l1 else (_L2_ANCHOR, 2 * anchor)
        if anchor_decoupled:
            anchor_mode, pull = _DECOUPLED_L1_ANCHOR if anchor_l1 else _DECOUPLED_L2_ANCHOR, lr * pull
    scalars = (1 - beta1, beta2, 1 - beta2, eps, decay, pull)
    flags = {
        "AMSGRAD": bool(max_exp_avg_sqs),
        "DECAY": decay_mode.value,
        "MAXIMIZE": maximize,
        "ANCHOR": anchor_mode.value,
    }
    with on_device(exp_avgs[0]):
        for launch in known.prepared((stream, anchored, known.items.tobytes()), prepare):
            _launch(launch, device, lr, beta1, beta2, scalars, flags, grad_scale, found_inf)


def _on_device(bucket: _Bucket, lines: list[list[int]], counts: list[int], device: torch.device) -> _Launch:
    starts = itertools.accumulate(counts, initial=0)
    table = torch.tensor([[*line, start] for line, start in zip(lines, starts, strict=False)], dtype=torch.int64)
    tiles = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
    return _Launch(bucket, _to_device(table, device), _to_device(tiles, device), len(lines))


def _launch(
    launch: _Launch,
    device: torch.device,
    lr: float,
    beta1: float,
    beta2: float,
    scalars: tuple[float, ...],
    flags: dict[str, object],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    bucket, table, tiles, tensors = launch
    corrections = torch.empty((tensors, 2), dtype=torch.float64, device=device)
    stochastic = bucket.rounding == _STOCHASTIC.value
    keys = torch.empty(tensors, dtype=torch.int64, device=device) if stochastic else None
    _advance[(triton.cdiv(tensors, STEPS),)](
        table, corrections, keys, found_inf, tensors, lr, beta1, beta2,
        STEP=TRITON_DTYPES[bucket.step_dtype], TENSORS=STEPS, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
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
        **_OPTIONS,
    }
    pointers = (table, tiles, corrections, keys, grad_scale, found_inf)
    if bucket.layout == Layout.BITS:
        found = torch.empty(total, dtype=torch.int32, device=device)
        _count_bits[(total,)](table, tiles, found, ALIGNED=bucket.aligned, WORDS=TILE_WORDS, num_warps=1)
        starts = found.cumsum(0) - found
        _step_bits[(total,)](*pointers, starts, *scalars, WORDS=TILE_WORDS, BATCH=BATCH, **flags)
    else:
        _step[(total,)](
            *pointers, *scalars,
            INDEX=TRITON_DTYPES[bucket.index_dtype or torch.int32], LAYOUT=bucket.layout, LINEAR=bucket.linear,
            HAS_WEIGHT=bucket.weight_dtype is not None, ENTRIES=ENTRIES, **flags,
        )  # fmt: skip
