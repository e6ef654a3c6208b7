"""Device code of masked Adam: the arithmetic of a step, and the kernels that apply it to the tiles of a table.

The table has one line for each tensor: its AdamItem, and the number of its first tile. A list names the tensor of
every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradsel_kernels._checks import Layout
from gradsel_kernels.adam_item import ITEM_WORDS, WORD_OF
from gradsel_kernels.triton.common import convert, div_rn, fma, power, sqrt_rn

_ALL = tl.constexpr(int(Layout.ALL))
_COLS = tl.constexpr(int(Layout.COLS))

# Columns of the table, all int64. Strides are in elements.
_WEIGHT = tl.constexpr(WORD_OF["weight"])
_VALUES = tl.constexpr(WORD_OF["values"])
_GRAD = tl.constexpr(WORD_OF["grad"])
_EXP_AVG = tl.constexpr(WORD_OF["exp_avg"])
_EXP_AVG_SQ = tl.constexpr(WORD_OF["exp_avg_sq"])
_MAX_EXP_AVG_SQ = tl.constexpr(WORD_OF["max_exp_avg_sq"])
_ORIGINAL = tl.constexpr(WORD_OF["original"])
_INDEX = tl.constexpr(WORD_OF["index"])
_COMPENSATION = tl.constexpr(WORD_OF["compensation"])
_STEP = tl.constexpr(WORD_OF["step"])
_SEED = tl.constexpr(WORD_OF["seed"])
_NNZ = tl.constexpr(WORD_OF["nnz"])
_ROWS = tl.constexpr(WORD_OF["rows"])
_COLUMNS = tl.constexpr(WORD_OF["cols"])
_INDEX_WIDTH = tl.constexpr(WORD_OF["index_width"])
_WEIGHT_ROW = tl.constexpr(WORD_OF["weight_row_stride"])
_WEIGHT_COL = tl.constexpr(WORD_OF["weight_col_stride"])
_GRAD_ROW = tl.constexpr(WORD_OF["grad_row_stride"])
_GRAD_COL = tl.constexpr(WORD_OF["grad_col_stride"])
_FIRST_TILE = tl.constexpr(ITEM_WORDS)
_FIELDS = tl.constexpr(ITEM_WORDS + 1)

NO_DECAY = tl.constexpr(0)
L2_DECAY = tl.constexpr(1)
DECOUPLED_DECAY = tl.constexpr(2)

NO_ANCHOR = tl.constexpr(0)
L2_ANCHOR = tl.constexpr(1)
L1_ANCHOR = tl.constexpr(2)
DECOUPLED_L2_ANCHOR = tl.constexpr(3)
DECOUPLED_L1_ANCHOR = tl.constexpr(4)

# How the weight receives its new value.
TO_NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
COMPENSATED = tl.constexpr(2)


@triton.jit
def pull_math(p, g, original, pull, ANCHOR: tl.constexpr):
    """The anchor's contribution to the gradient or the parameter, as in the specification.

    ``pull`` multiplies the gap or its sign (L1), in the gradient (coupled) or in the step (decoupled).
    """
    gap = p - original
    sign = (gap > 0).to(gap.dtype) - (gap < 0).to(gap.dtype)  # 0 for NaN, as in torch.sign
    if ANCHOR == L2_ANCHOR:
        g = fma(gap, pull, g)
    if ANCHOR == L1_ANCHOR:
        g = fma(sign, pull, g)
    if ANCHOR == DECOUPLED_L2_ANCHOR:
        p = fma(gap, -pull, p)
    if ANCHOR == DECOUPLED_L1_ANCHOR:
        p = tl.where(tl.abs(gap) <= pull, original, fma(sign, -pull, p))
    return p, g


@triton.jit
def adam_math(
    p, g, m, v, v_max, original, step_size, root_of_correction, lerp_weight, beta2, square_weight, eps, decay, pull,
    AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
):  # fmt: skip
    """One step in the order of torch's single-tensor Adam: each fma is one of torch's, and all else is rounded.

    ``decay`` is the weight decay (L2) or the factor 1 - lr * weight_decay (decoupled). For ``pull`` see
    :func:`pull_math`.
    """
    if MAXIMIZE:
        g = -g
    if DECAY == L2_DECAY:
        g = fma(decay, p, g)
    if DECAY == DECOUPLED_DECAY:
        p = p * decay
    if ANCHOR != NO_ANCHOR:
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
    """Rounds float32 to one of its neighbours in bfloat16 or float16, bit for bit as in the specification."""
    word = mix(mix(entry.to(tl.uint32) ^ keys.to(tl.uint32)) ^ (entry >> 32).to(tl.uint32) ^ (keys >> 32).to(tl.uint32))
    bits = x.to(tl.uint32, bitcast=True)
    DROPPED: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 13  # noqa: SIM300
    rounded = ((bits >> DROPPED) + (word < (bits << (32 - DROPPED))).to(tl.uint32)) << DROPPED
    if DTYPE == tl.float16:  # noqa: SIM300
        # Below 2**-14 the numbers are the multiples of 2**-24; all products and differences here are exact.
        small = tl.abs(x) < 6.103515625e-05
        multiple = tl.where(small, tl.abs(x), 0.0) * 16777216.0
        whole = multiple.to(tl.int32)
        fraction = ((multiple - whole.to(tl.float32)) * 4294967296.0).to(tl.uint32)
        tiny = (whole + (word < fraction).to(tl.int32)).to(tl.float32) * 5.9604644775390625e-08
        rounded = tl.where(small, tiny.to(tl.uint32, bitcast=True) | (bits & 0x80000000), rounded)
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # a NaN would carry into the sign


@triton.jit
def _allowed(valid, found_inf):
    """Nothing is valid if gradients overflowed. Skipping the launch instead would make the host wait for the flag."""
    if found_inf is not None:
        valid = tl.where(tl.load(found_inf) == 0, valid, False)  # the interpreter cannot & with a scalar
    return valid


@triton.jit(do_not_specialize=["count"])
def advance(
    table, corrections, keys, found_inf, rates, scalars, count, lr: tl.float64, beta1: tl.float64, beta2: tl.float64,
    decay: tl.float64, pull: tl.float64,
    STEP: tl.constexpr, TENSORS: tl.constexpr, DECOUPLED_DECAY: tl.constexpr, DECOUPLED_PULL: tl.constexpr,
):  # fmt: skip
    """Counts the steps and writes each tensor's (step size, root of the second correction) in float64.

    If there are ``keys``, it also writes the random keys of the step.

    If there are ``rates``, they are read in place of ``lr``, ``beta1`` and ``beta2``, and the numbers that ``step``
    then finds in ``scalars`` are made of them: ``decay`` is the weight decay, and ``pull`` the factor of the gap, if it
    is decoupled without ``lr``.
    """
    if rates is not None:
        lr = tl.load(rates)
        beta1 = tl.load(rates + 1)
        beta2 = tl.load(rates + 2)
        if tl.program_id(0) == 0:
            tl.store(scalars, 1.0 - beta1)
            tl.store(scalars + 1, beta2)
            tl.store(scalars + 2, 1.0 - beta2)
            weight_decay = tl.full((), decay, tl.float64)
            factor = tl.full((), pull, tl.float64)
            tl.store(scalars + 3, 1.0 - lr * weight_decay if DECOUPLED_DECAY else weight_decay)
            tl.store(scalars + 4, lr * factor if DECOUPLED_PULL else factor)
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    valid = _allowed(i < count, found_inf)
    address = tl.load(table + i * _FIELDS + _STEP, mask=valid, other=0).to(tl.pointer_type(STEP))
    step = tl.load(address, mask=valid, other=0.0) + 1.0
    tl.store(address, step, mask=valid)
    t = step.to(tl.int64)
    zero = tl.zeros([TENSORS], tl.float64)
    step_size = (zero + tl.full((), lr, tl.float64)) / (1.0 - power(zero + tl.full((), beta1, tl.float64), t))
    root = tl.sqrt(1.0 - power(zero + tl.full((), beta2, tl.float64), t))
    tl.store(corrections + 2 * i, step_size, mask=valid)
    tl.store(corrections + 2 * i + 1, root, mask=valid)
    if keys is not None:
        seed = tl.load(table + i * _FIELDS + _SEED, mask=valid, other=0)
        tl.store(keys + i, _random_keys(seed, t), mask=valid)


@triton.jit
def _vector(table, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A field of a tensor's line as a pointer to a contiguous vector."""
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
    """Loads, updates and stores the entries of one tile, given their numbers in mask order and their offsets.

    Computes in STATE; moments are stored as MOMENT.

    ``valid`` entries exist, and those ``inside`` lie in the weight. State is read and written for all valid entries and
    keeps its value where an offset is outside, because a mask that differs from lane to lane would prevent vector
    accesses.
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
    if ROUNDING == COMPENSATED:
        compensation = _vector(item, _COMPENSATION, WEIGHT, ALIGNED) + entry
        kept = tl.load(compensation, mask=valid, other=0.0)
        p += convert(kept, STATE)
    original = p
    if ANCHOR != NO_ANCHOR:
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
    if ROUNDING == STOCHASTIC:
        new_p = round_stochastically(new_p, entry, tl.load(keys + tensor), WEIGHT)
    if HAS_WEIGHT:
        rounded = convert(new_p, WEIGHT)
        tl.store(weight, rounded, mask=inside)
    if ROUNDING == COMPENSATED:
        lost = new_p - convert(rounded, STATE)
        lost = convert(tl.where(tl.abs(lost) < float("inf"), lost, 0.0), WEIGHT)
        tl.store(compensation, tl.where(inside, lost, kept), mask=valid)


@triton.jit
def step(
    table, tiles, corrections, keys, grad_scale, found_inf, scalars, lerp_weight: tl.float64, beta2: tl.float64,
    square_weight: tl.float64, eps: tl.float64, decay: tl.float64, pull: tl.float64,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MOMENT: tl.constexpr, INDEX: tl.constexpr,
    LAYOUT: tl.constexpr, COMPACT: tl.constexpr, LINEAR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_VALUES: tl.constexpr, ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """One tile of a tensor.

    COMPACT: the gradient is in mask order. LINEAR: dense tensors have entries at their flat index, row * cols + col.
    If there are ``scalars``, from ``advance``, they take the place of all numbers but ``eps``.
    """
    if scalars is not None:
        lerp_weight = tl.load(scalars)
        beta2 = tl.load(scalars + 1)
        square_weight = tl.load(scalars + 2)
        decay = tl.load(scalars + 3)
        pull = tl.load(scalars + 4)
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
        # One division in 64 bits finds the row of the first entry; those of the lanes take 32.
        k = tl.load(item + _INDEX_WIDTH)
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
