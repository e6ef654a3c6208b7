"""Shared by several kernels: number formats, packed words, rounded arithmetic, and the launch guard."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Whether Triton's interpreter runs the kernels in this process. TRITON_INTERPRET decides when triton is imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


def on_device(tensor: torch.Tensor) -> torch.cuda.device_of:
    """A context in which kernels start on the tensor's device; nothing for the CPU tensors of the interpreter."""
    return torch.cuda.device_of(tensor)


@triton.jit
def magnitude_key(x):
    """|x| as an integer in the same order: int32, or int64 for float64. -0.0 equals 0.0; every NaN is just above inf.

    Integers compare exactly, and the interpreter computes wrongly in bfloat16.
    """
    if x.dtype == tl.float64:
        key = tl.minimum(x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001)
    elif x.dtype == tl.float32:
        key = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    elif x.dtype == tl.bfloat16:
        key = tl.minimum(x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7F81)
    else:
        key = tl.minimum(x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7C01)
    return key


@triton.jit
def pack_words(flags, WORDS: tl.constexpr):
    """int32 [WORDS] from int32 flags [32 * WORDS] that are 0 or 1; the sum is an OR because every bit occurs once."""
    return tl.sum(tl.reshape(flags, [WORDS, 32]) << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def entries_of(row, row_offsets, rows, k, nnz):
    """The first of each row's entries and the one after its last, in bounds of cols whatever the offsets are."""
    if row_offsets is None:
        start = tl.where(row < rows, row * k, 0)
        end = tl.where(row < rows, row * k + k, 0)
    else:
        start = tl.maximum(tl.load(row_offsets + row, mask=row < rows, other=0), 0)
        end = tl.minimum(tl.load(row_offsets + row + 1, mask=row < rows, other=0), nnz)
    return start, end


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """x in another float format, converted as torch does: to nearest even, and from float64 to 16 bits via float32.

    bfloat16 is converted with integers, because the interpreter would truncate.
    """
    y = x
    if x.dtype != DTYPE:
        if x.dtype == tl.bfloat16:
            y = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            bits = y.to(tl.float32).to(tl.int32, bitcast=True)
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
            nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            y = tl.where(is_nan, 0x7FC0, nearest).to(tl.int16).to(tl.bfloat16, bitcast=True)
        elif DTYPE == tl.float16:  # noqa: SIM300
            y = y.to(tl.float32).to(tl.float16)
        else:
            y = y.to(DTYPE)
    return y


@triton.jit
def fma(x, y, z):
    """x * y + z rounded once. The interpreter would round twice, an error that cancellation magnifies."""
    if INTERPRETED:
        if z.dtype == tl.float64:
            # Dekker's exact product, then Knuth's exact sum; 134217729 = 2**27 + 1 splits a significand in two.
            xs = x * 134217729.0
            ys = y * 134217729.0
            xh = xs - (xs - x)
            yh = ys - (ys - y)
            xl = x - xh
            yl = y - yh
            product = x * y
            tail = ((xh * yh - product) + xh * yl + xl * yh) + xl * yl
            total = product + z
            back = total - product
            exact = total + (((product - (total - back)) + (z - back)) + tail)
            result = tl.where(exact == exact, exact, total)  # the splitting overflows where the plain sum is right
        else:
            result = (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result


@triton.jit
def div_rn(x, y):
    """x / y rounded to nearest: Triton's float32 division is approximate, its float64 division is not."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def sqrt_rn(x):
    """Square root rounded to nearest, for the same reason as :func:`div_rn`."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _product(a, a_low, b, b_low):
    """Product of two unevaluated sums of two doubles, as another such sum."""
    high = a * b
    low = fma(a, b, -high) + (a * b_low + a_low * b)
    total = high + low
    return total, low - (total - high)


@triton.jit
def power(base, exponent):
    """base ** exponent for int64 exponents, correctly rounded in all but the rarest cases.

    In the first steps 1 - beta**t cancels: an error of one unit in the last place of the power would become thousands
    in the update, so exp(t * log(beta)) in double precision is not enough for float64 states.
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
