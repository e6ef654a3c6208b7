"""Products with the selected entries of a weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradsel_kernels.triton.common import convert, entries_of, on_device

#: Sums of one program: four a thread, whose loads hide each other's latency.
SUMS = 512
#: Tokens of a program, at most. The inputs of one column lie far apart, so more rows are better than more tokens.
TOKENS = 16


@triton.jit(do_not_specialize=["tokens", "rows", "n", "k", "nnz", "blocks"])
def _selected_addmm(
    output, input, cols, values, row_offsets, output_stride_token, output_stride_row, input_stride_token,
    input_stride_col, tokens, rows, n, k, nnz, blocks,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    start, end = entries_of(row, row_offsets, rows, k, nnz)
    SUM: tl.constexpr = values.dtype.element_ty
    sums = tl.zeros([TOKENS, ROWS], dtype=SUM)
    for j in range(tl.max(end - start, axis=0)):
        col = tl.load(cols + start + j, mask=start + j < end, other=-1)
        value = tl.load(values + start + j, mask=start + j < end, other=0.0)
        inside = (token < tokens)[:, None] & ((col >= 0) & (col < n))[None, :]
        place = input + token[:, None] * input_stride_token + col.to(tl.int64)[None, :] * input_stride_col
        x = convert(tl.load(place, mask=inside, other=float("nan")), SUM)
        sums += tl.where((start + j < end)[None, :], x * value[None, :], 0.0)
    place = output + token[:, None] * output_stride_token + row[None, :] * output_stride_row
    valid = (token < tokens)[:, None] & (row < rows)[None, :]
    before = convert(tl.load(place, mask=valid), SUM)
    tl.store(place, convert(before + sums, output.dtype.element_ty), mask=valid)


def selected_addmm_(output: Tensor, input: Tensor, cols: Tensor, values: Tensor, row_offsets: Tensor | None) -> None:
    """``output += input @ D.T`` for D with ``values`` at ``cols``; inputs in columns out of range are NaN."""
    tokens, rows = output.shape
    if not output.numel():
        return
    tile = min(TOKENS, triton.next_power_of_2(tokens))
    blocks = triton.cdiv(rows, SUMS // tile)
    if row_offsets is not None:
        row_offsets = row_offsets.contiguous()
    with on_device(output):
        _selected_addmm[(triton.cdiv(tokens, tile) * blocks,)](
            output, input, cols.contiguous(), values.contiguous(), row_offsets, *output.stride(), *input.stride(),
            tokens, rows, input.shape[1], cols.shape[1] if row_offsets is None else 0, cols.numel(), blocks,
            TOKENS=tile, ROWS=SUMS // tile,
        )  # fmt: skip
