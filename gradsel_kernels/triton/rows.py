"""Reading and writing the selected entries of a neuron view."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsel_kernels.triton.common import convert, on_device

#: Entries of one program: latency bounds scattered reads, so many small programs are best.
ENTRIES = 512


@triton.jit(do_not_specialize=["rows", "n", "k", "chunks"])
def _gather_rows(
    weight, cols, out, stride_row, stride_col, cols_stride_row, cols_stride_col, rows, n, k, chunks,
    ROWS: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(0) % chunks * K + tl.arange(0, K)[None, :]
    valid = (row < rows) & (j < k)
    col = tl.load(cols + row * cols_stride_row + j.to(tl.int64) * cols_stride_col, mask=valid, other=0)
    inside = valid & (col >= 0) & (col < n)
    # Bits are copied unchanged, so one kernel serves all formats of a size.
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else tl.int32 if BITS == 32 else tl.int64
    source = weight.to(tl.pointer_type(INTEGER), bitcast=True)
    target = out.to(tl.pointer_type(INTEGER), bitcast=True)
    x = tl.load(source + row * stride_row + col.to(tl.int64) * stride_col, mask=inside, other=NAN)
    tl.store(target + row * k + j, x, mask=valid)


@triton.jit(do_not_specialize=["rows", "n", "k", "chunks"])
def _scatter_rows(
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


def _tiling(rows: int, k: int) -> tuple[int, int, int, int]:
    """(programs, programs a row of tiles, rows of a tile, entries a row of a tile); tiles avoid dividing by k."""
    tile_k = min(ENTRIES, triton.next_power_of_2(k))
    tile_rows = ENTRIES // tile_k
    chunks = triton.cdiv(k, tile_k)
    return triton.cdiv(rows, tile_rows) * chunks, chunks, tile_rows, tile_k


def gather_rows(weight: Tensor, cols: Tensor) -> Tensor:
    """``out[r, j] = weight[r, cols[r, j]]``; NaN where the column is out of range."""
    rows, k = cols.shape
    out = torch.empty((rows, k), dtype=weight.dtype, device=weight.device)
    if out.numel():
        programs, chunks, tile_rows, tile_k = _tiling(rows, k)
        with on_device(weight):
            _gather_rows[(programs,)](
                weight, cols, out, *weight.stride(), *cols.stride(), rows, weight.shape[1], k, chunks,
                ROWS=tile_rows, K=tile_k, BITS=8 * weight.element_size(), NAN=_NAN_BITS[weight.dtype],
            )  # fmt: skip
    return out


def scatter_rows_(weight: Tensor, cols: Tensor, values: Tensor) -> None:
    """``weight[r, cols[r, j]] = values[r, j]`` in the weight's dtype; a column out of range is skipped."""
    rows, k = cols.shape
    if cols.numel():
        programs, chunks, tile_rows, tile_k = _tiling(rows, k)
        with on_device(weight):
            _scatter_rows[(programs,)](
                weight, cols, values, *weight.stride(), *cols.stride(), *values.stride(),
                rows, weight.shape[1], k, chunks, ROWS=tile_rows, K=tile_k,
            )  # fmt: skip
