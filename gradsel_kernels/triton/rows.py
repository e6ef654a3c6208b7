"""Reading and writing the selected entries of a neuron view."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsel_kernels.triton.common import convert, on_device

#: Entries of one program: scattered reads are bound by latency, so many small programs.
ENTRIES = 512


@triton.jit(do_not_specialize=["rows", "n", "k", "chunks"])
def _gather(
    weight, cols, out, stride_row, stride_col, cols_stride_row, cols_stride_col, rows, n, k, chunks,
    ROWS: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(0) % chunks * K + tl.arange(0, K)[None, :]
    valid = (row < rows) & (j < k)
    col = tl.load(cols + row * cols_stride_row + j.to(tl.int64) * cols_stride_col, mask=valid, other=0)
    inside = valid & (col >= 0) & (col < n)
    # Bits are copied as they are, so the kernel is the same for every format of a size.
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else tl.int32 if BITS == 32 else tl.int64
    source = weight.to(tl.pointer_type(INTEGER), bitcast=True)
    target = out.to(tl.pointer_type(INTEGER), bitcast=True)
    x = tl.load(source + row * stride_row + col.to(tl.int64) * stride_col, mask=inside, other=NAN)
    tl.store(target + row * k + j, x, mask=valid)


@triton.jit(do_not_specialize=["rows", "n", "k", "chunks"])
def _scatter(
    weight, cols, values, stride_row, stride_col, cols_stride_row, cols_stride_col,
    values_stride_row, values_stride_col, rows, n, k, chunks,
    ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(0) % chunks * K + tl.arange(0, K)[None, :]
    valid = (row < rows) & (j < k)
    col = tl.load(cols + row * cols_stride_row + j.to(tl.int64) * cols_stride_col, mask=valid, other=-1)
    inside = valid & (col >= 0) & (col < n)
    x = tl.load(values + row * values_stride_row + j.to(tl.int64) * values_stride_col, mask=inside)
    x = convert(x, weight.dtype.element_ty)
    tl.store(weight + row * stride_row + col.to(tl.int64) * stride_col, x, mask=inside)


_NAN_BITS = {
    torch.float64: 0x7FF8000000000000,
    torch.float32: 0x7FC00000,
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
}


def _tile(rows: int, k: int) -> tuple[int, int, int, int]:
    """Programs, programs a row, rows and entries a row of one tile: a tile spares each entry a division by k."""
    tile_k = min(ENTRIES, triton.next_power_of_2(k))
    tile_rows = ENTRIES // tile_k
    chunks = triton.cdiv(k, tile_k)
    return triton.cdiv(rows, tile_rows) * chunks, chunks, tile_rows, tile_k


def gather_rows(weight: Tensor, cols: Tensor) -> Tensor:
    """``out[r, j] = weight[r, cols[r, j]]``; NaN where the column is out of range."""
    rows, k = cols.shape
    out = torch.empty((rows, k), dtype=weight.dtype, device=weight.device)
    if out.numel():
        programs, chunks, tile_rows, tile_k = _tile(rows, k)
        with on_device(weight):
            _gather[(programs,)](
                weight, cols, out, *weight.stride(), *cols.stride(), rows, weight.shape[1], k, chunks,
                ROWS=tile_rows, K=tile_k, BITS=8 * weight.element_size(), NAN=_NAN_BITS[weight.dtype],
            )  # fmt: skip
    return out


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    """``weight[r, cols[r, j]] = values[r, j]`` in the weight's dtype; a column out of range is skipped."""
    rows, k = cols.shape
    if cols.numel():
        programs, chunks, tile_rows, tile_k = _tile(rows, k)
        with on_device(weight):
            _scatter[(programs,)](
                weight, cols, values, *weight.stride(), *cols.stride(), *values.stride(),
                rows, weight.shape[1], k, chunks, ROWS=tile_rows, K=tile_k,
            )  # fmt: skip
