"""Selected entries of a weight gradient, and the copy of the activation columns that they need.

Two kernels take the sums. One adds up the products of every entry on the ordinary cores: few bytes and few operations,
right for a few entries a row. The other multiplies dense tiles on the matrix units and keeps their selected entries:
each product costs next to nothing there, and an activation read once serves all rows of the tile. Both walk along the
tokens, keep their sums in registers and write each entry once; the dense gradient is never in memory. If there are too
few tiles to fill the device, several programs divide the tokens of a tile, and their sums are added in a fixed order:
nothing is added atomically, so every run gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsel_kernels import panels
from gradsel_kernels._checks import sum_dtype
from gradsel_kernels.triton.common import INTERPRETED, convert, entries_of, on_device

# Nothing here has been measured on a GPU: these are estimates from data sheets (H100) and counts of bytes and products.

#: Bytes a second that scattered reads get from the L2 cache.
CACHE_RATE = 5e12
#: Bytes that one such read moves if the tokens of a column are not adjacent: a sector of the cache.
SECTOR = 32
#: Operations a second of dense tiles, by the size of a number. Float32 does not use the matrix units, which would
#: round it to tf32.
DENSE_RATE = {2: 600e12, 4: 30e12, 8: 30e12}
#: Programs that keep all 132 multiprocessors busy: several on each where they wait for memory, otherwise one or two.
GATHER_PROGRAMS = 1024
TILE_PROGRAMS = 264
#: Steps along the tokens below which it is not worth starting another program.
LEAST_STEPS = 4
#: Selected entries of each row of a dense tile that are looked up at a time.
LOOKED_UP = tl.constexpr(16)
#: Row tiles whose programs run at the same time, so that both operands are shared through the cache.
SWIZZLE = tl.constexpr(8)
#: Entries that one program of take_columns copies: 32 a thread.
COPIED = 4096


# Device ---------------------------------------------------------------------------------------------------------


# Both kernels take the tokens in steps: a step lies in one batch, and ``chunks`` steps make a batch. The programs of
# split s sum steps s * steps_a_split to (s + 1) * steps_a_split and write to line s of ``out`` and ``bias``.


@triton.jit(do_not_specialize=["n", "k", "nnz", "chunks", "steps", "steps_a_split", "parts"])
def _gather(
    grad_output, input, cols, row_offsets, out, bias,
    grad_batch, grad_token, grad_row, input_batch, input_token, input_col,
    tokens, rows, n, k, nnz, chunks, steps, steps_a_split, parts,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """A tile of rows, and every ``parts``-th K of their entries: each keeps its own sums [TOKENS] until the end."""
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * steps_a_split
    last = tl.minimum(first + steps_a_split, steps)
    start, end = entries_of(row, row_offsets, rows, k, nnz)
    longest = tl.max(end - start, axis=0).to(tl.int32)

    # Further entries mean another pass over grad_output, mostly from cache: the K sums of one pass hold the registers.
    # The first pass runs even if no row has an entry, for the bias.
    for j in range(part * K, tl.maximum(longest, 1), parts * K):
        entry = start[:, None] + j + tl.arange(0, K)[None, :]
        there = entry < end[:, None]
        col = tl.load(cols + entry, mask=there, other=-1)
        inside = (col >= 0) & (col < n)
        column = input + col.to(tl.int64) * input_col
        sums = tl.zeros([TOKENS, ROWS, K], SUM)
        row_sums = tl.zeros([TOKENS, ROWS, 1], SUM)
        for step in range(first, last):
            batch = (step // chunks).to(tl.int64)
            token = step % chunks * TOKENS + tl.arange(0, TOKENS)
            place = token.to(tl.int64)
            g = tl.load(
                grad_output + batch * grad_batch + row[None, :] * grad_row + place[:, None] * grad_token,
                mask=(row < rows)[None, :] & (token < tokens)[:, None], other=0.0,
            )  # fmt: skip
            x = tl.load(
                column[None, :, :] + batch * input_batch + place[:, None, None] * input_token,
                mask=inside[None, :, :] & (token < tokens)[:, None, None], other=0.0,
            )  # fmt: skip
            g = convert(g[:, :, None], SUM)
            sums += g * convert(x, SUM)
            if bias is not None:
                row_sums += g
        value = tl.where(inside, tl.sum(sums, axis=0), float("nan"))
        tl.store(out + split * nnz + entry, value, mask=there)
        if bias is not None:
            tl.store(bias + split * rows + row, tl.sum(tl.sum(row_sums, axis=2), axis=0), mask=(row < rows) & (j == 0))


@triton.jit
def _owned(cols, entry, end, n, chunk, COLS: tl.constexpr):
    """The columns of entries, which of them exist, and which a chunk writes: the first one also those out of range."""
    there = entry < end
    col = tl.load(cols + entry, mask=there, other=0)
    inside = (col >= 0) & (col < n)
    return col, inside, there & (tl.where(inside, col // COLS, 0) == chunk)


@triton.jit
def _grad_tile(grad_output, grad_batch, grad_token, grad_row, tokens, rows, chunks, row, step, TOKENS: tl.constexpr):
    """grad_output [ROWS, TOKENS] of one step."""
    token = step % chunks * TOKENS + tl.arange(0, TOKENS)
    base = grad_output + (step // chunks).to(tl.int64) * grad_batch + row[:, None] * grad_row
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    return tl.load(base + token.to(tl.int64)[None, :] * grad_token, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["k", "nnz", "chunks", "steps", "steps_a_split", "parts"])
def _tile(
    grad_output, input, cols, row_offsets, out, bias,
    grad_batch, grad_token, grad_row, input_batch, input_token, input_col,
    tokens, rows, n, k, nnz, chunks, steps, steps_a_split, parts,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """A tile of rows times one of ``parts`` chunks of columns, unless no entry of the rows is in the chunk.

    The bias has a part of its own, the last, which reads grad_output at the same time as the others.
    """
    pid = tl.program_id(0)
    tile, chunk = tl.swizzle2d(pid // parts, pid % parts, tl.cdiv(rows, ROWS), parts, SWIZZLE)
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * steps_a_split
    last = tl.minimum(first + steps_a_split, steps)
    if bias is not None and chunk == parts - 1:
        row_sums = tl.zeros([ROWS, TOKENS], SUM)
        for step in tl.range(first, last, num_stages=4):
            g = _grad_tile(grad_output, grad_batch, grad_token, grad_row, tokens, rows, chunks, row, step, TOKENS)
            row_sums += convert(g, SUM)
        tl.store(bias + split * rows + row, tl.sum(row_sums, axis=1), mask=row < rows)
        return

    # Each row may have entries in the chunk from its lowest-th to its highest-th: far fewer than all if cols ascend.
    start, end = entries_of(row, row_offsets, rows, k, nnz)
    longest = tl.max(end - start, axis=0).to(tl.int32)
    lowest = tl.full([ROWS, LOOKED_UP], 0x7FFFFFFF, tl.int32)
    highest = tl.full([ROWS, LOOKED_UP], -1, tl.int32)
    for j in range(0, longest, LOOKED_UP):
        place = j + tl.arange(0, LOOKED_UP)[None, :]
        _, _, owned = _owned(cols, start[:, None] + place, end[:, None], n, chunk, COLS)
        lowest = tl.minimum(lowest, tl.where(owned, place, 0x7FFFFFFF))
        highest = tl.maximum(highest, tl.where(owned, place, -1))
    after = tl.max(tl.max(highest, axis=1), axis=0) + 1
    if after == 0:
        return

    col = chunk * COLS + tl.arange(0, COLS)
    column = input + col.to(tl.int64)[None, :] * input_col
    sums = tl.zeros([ROWS, COLS], SUM)
    for step in range(first, last):
        g = _grad_tile(grad_output, grad_batch, grad_token, grad_row, tokens, rows, chunks, row, step, TOKENS)
        token = step % chunks * TOKENS + tl.arange(0, TOKENS)
        x = tl.load(
            column + (step // chunks).to(tl.int64) * input_batch + token.to(tl.int64)[:, None] * input_token,
            mask=(col < n)[None, :] & (token < tokens)[:, None], other=0.0,
        )  # fmt: skip
        if INTERPRETED:
            g = convert(g, SUM)
            x = convert(x, SUM)
        # "ieee": by default float32 is cut to tf32, 11 bits of significand, where the other strategies have 24.
        sums = tl.dot(g, x, sums, input_precision="ieee", out_dtype=SUM)

    for j in range(tl.min(tl.min(lowest, axis=1), axis=0), after):
        selected, inside, owned = _owned(cols, start + j, end, n, chunk, COLS)
        # Sums with columns that are not selected may be NaN: they are replaced, not multiplied away.
        value = tl.sum(tl.where(selected[:, None] == col[None, :], sums, 0.0), axis=1)
        tl.store(out + split * nnz + start + j, tl.where(inside, value, float("nan")), mask=owned)


@triton.jit(do_not_specialize=["n", "count", "parts", "chunks"])
def _take_columns(
    input, columns, out, stride_batch, stride_token, stride_col, tokens, n, count, parts, chunks,
    TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of one batch: threads read along the columns, and write along the tokens."""
    place = tl.program_id(0) // parts
    batch = (place // chunks).to(tl.int64)
    token = place % chunks * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(0) % parts * COLS + tl.arange(0, COLS)
    col = tl.load(columns + c, mask=c < count, other=-1)
    column = input + batch * stride_batch + col.to(tl.int64)[None, :] * stride_col
    x = tl.load(
        column + token.to(tl.int64)[:, None] * stride_token,
        mask=(token < tokens)[:, None] & ((col >= 0) & (col < n))[None, :], other=float("nan"),
    )  # fmt: skip
    line = (batch * count + c) * tokens
    tl.store(out + line[None, :] + token[:, None], x, mask=(token < tokens)[:, None] & (c < count)[None, :])


# Host -----------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """The tile of one program: tokens at a time, rows, and entries a row (gather) or columns (tile)."""

    tokens: int
    rows: int
    width: int
    warps: int
    stages: int


def gather_config(k: int, itemsize: int) -> Config:
    """64 bytes of a column, two sectors of the cache, for 64 entries: at most 16 sums a thread.

    That leaves registers for four to seven programs on a multiprocessor, whose loads hide each other's latency.
    """
    width = min(4, triton.next_power_of_2(max(k, 1)))
    return Config(tokens=64 // itemsize, rows=64 // width, width=width, warps=4, stages=1)


def tile_config(rows: int, n: int, itemsize: int) -> Config:
    """Tiles as large as registers allow with two programs on a multiprocessor; in 16 bits no wider than the problem.

    128 x 128 sums of 16-bit products take 64 registers of 256 threads, and three stages of 64 tokens 96 KiB of shared
    memory. The ordinary cores need registers for their operands too: 64 x 64 in float32, and for GPUs without matrix
    units for float64 the same there.
    """
    if itemsize == 8:
        return Config(tokens=16, rows=64, width=64, warps=8, stages=2)
    if itemsize == 4:
        return Config(tokens=32, rows=64, width=64, warps=8, stages=2)
    tall = 128 if rows > 64 else 64
    return Config(tokens=64, rows=tall, width=min(128, max(32, triton.next_power_of_2(n))), warps=tall // 16, stages=3)


def splits(programs: int, steps: int, wanted: int) -> tuple[int, int]:
    """Programs that share the tokens of a tile, and the steps of each: from shapes alone, as they order the sums."""
    count = max(1, min(wanted // programs, steps // LEAST_STEPS))
    steps_a_split = triton.cdiv(steps, count)
    return (triton.cdiv(steps, steps_a_split) if steps else 1), steps_a_split


def choose(n: int, k: float, itemsize: int, adjoining: bool) -> str:
    """The faster strategy by the counts: k reads from cache for each row and token, or n products in a dense tile.

    Both read grad_output as well. ``n`` is the width of the activation, of which every chunk is assumed to be needed.
    """
    gather = k * (itemsize if adjoining else SECTOR) / CACHE_RATE
    return "gather" if gather <= 2 * n / DENSE_RATE[itemsize] else "tile"


def take_config(tokens: int) -> tuple[int, int]:
    """(tokens, columns) of one tile: 64 tokens fill the lines that are written, 64 columns share those read."""
    tile_tokens = min(64, max(16, triton.next_power_of_2(tokens)))
    return tile_tokens, COPIED // tile_tokens


def _batched(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [batch, tokens, features], with as few batches as strides allow: a step lies in one batch."""
    if grad_output.ndim == 2:
        return grad_output.unsqueeze(0), input.unsqueeze(0)
    batch, tokens = grad_output.shape[:2]
    if batch == 1 or all(x.stride(0) == tokens * x.stride(1) for x in (grad_output, input)):
        return grad_output.flatten(0, 1).unsqueeze(0), input.flatten(0, 1).unsqueeze(0)
    if tokens < batch and tokens < 16:  # the sum is over both, so the longer one may be the tokens
        return grad_output.transpose(0, 1), input.transpose(0, 1)
    return grad_output, input


def _sums(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    grad_output, input = _batched(grad_output, input)
    batch, tokens, rows = grad_output.shape
    n, nnz = input.shape[-1], cols.numel()
    dtype = sum_dtype(grad_output.dtype)
    itemsize = grad_output.element_size()
    if strategy == "auto":
        strategy = choose(n, nnz / max(rows, 1), itemsize, adjoining=input.stride(1) == 1)
    if strategy == "gather":
        kernel, wanted = _gather, GATHER_PROGRAMS
        k = triton.cdiv(nnz, max(rows, 1))
        config = gather_config(k, itemsize)
        parts = max(1, triton.cdiv(k, config.width))
    else:
        kernel, wanted = _tile, TILE_PROGRAMS
        config = tile_config(rows, n, itemsize)
        parts = max(1, triton.cdiv(n, config.width)) + with_bias
    chunks = triton.cdiv(tokens, config.tokens)
    programs = triton.cdiv(rows, config.rows) * parts
    count, steps_a_split = splits(max(programs, 1), batch * chunks, wanted)

    out = torch.empty((count, *cols.shape), dtype=dtype, device=cols.device)
    bias = torch.empty((count, rows), dtype=dtype, device=cols.device) if with_bias else None
    if out.numel() or (bias is not None and bias.numel()):
        width = {"K" if strategy == "gather" else "COLS": config.width}
        with on_device(grad_output):
            kernel[(programs, count)](
                grad_output, input, cols.contiguous(), None if row_offsets is None else row_offsets.contiguous(),
                out, bias, *grad_output.stride(), *input.stride(),
                tokens, rows, n, cols.shape[-1], nnz, chunks, batch * chunks, steps_a_split, parts,
                TOKENS=config.tokens, ROWS=config.rows, **width, SUM=tl.float64 if itemsize == 8 else tl.float32,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    if count == 1:
        return out.squeeze(0), None if bias is None else bias.squeeze(0)
    return out.sum(0), None if bias is None else bias.sum(0)


def selected_weight_grad(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> Tensor:
    """The selected entries of ``grad_output^T @ input``; NaN where the column is out of range."""
    if strategy == "union":
        return panels.union(grad_output, input, cols, row_offsets)
    return _sums(grad_output, input, cols, row_offsets, strategy, with_bias=False)[0]


def selected_weight_grad_bias(
    grad_output: Tensor, input: Tensor, cols: Tensor, row_offsets: Tensor | None, strategy: str
) -> tuple[Tensor, Tensor]:
    """:func:`selected_weight_grad`, and the sum of ``grad_output`` over its tokens."""
    if strategy == "union":
        return panels.union(grad_output, input, cols, row_offsets), panels.token_sums(grad_output)
    grad, bias = _sums(grad_output, input, cols, row_offsets, strategy, with_bias=True)
    assert bias is not None
    return grad, bias


def take_columns(input: Tensor, columns: Tensor) -> Tensor:
    """``input[..., columns].mT``, contiguous; NaN where the column is out of range."""
    tokens, n = input.shape[-2:]
    count = columns.numel()
    out = torch.empty((*input.shape[:-2], count, tokens), dtype=input.dtype, device=input.device)
    if out.numel():
        tile_tokens, tile_cols = take_config(tokens)
        chunks, parts = triton.cdiv(tokens, tile_tokens), triton.cdiv(count, tile_cols)
        batch = input.shape[0] if input.ndim == 3 else 1
        with on_device(input):
            _take_columns[(batch * chunks * parts,)](
                input, columns.contiguous(), out, input.stride(0) if input.ndim == 3 else 0, *input.stride()[-2:],
                tokens, n, count, parts, chunks, TOKENS=tile_tokens, COLS=tile_cols,
            )  # fmt: skip
    return out
