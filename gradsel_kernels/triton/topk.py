"""Row-wise top-K of |grad|: columns of the K largest magnitudes in every row, and the packed mask of them.

Two questions choose among four kernels. Does a row fit in registers? Then the gradient is read once; otherwise it is
streamed in chunks, once for every pick or bit. Is K small? Then K rounds each find the largest key and its lowest
column; otherwise the K-th key is bisected bit by bit, and a prefix sum ranks the entries. All compare integer keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsel_kernels._checks import WORD, words
from gradsel_kernels.triton.common import magnitude_key, on_device, pack_words

#: Rounds cost one or two reductions for each of the K picks; bisection costs one for each bit of the key.
SMALL_K = 8
#: Bytes of the longest row of keys held in registers: 32 registers a thread at 16 warps; counts fit 16 bits.
BYTES_IN_REGISTERS = 65536
#: Columns that bisection ranks at once: ranks need registers of their own, so longer rows are read again, from cache.
RANKED_AT_ONCE = 4096
#: Bytes of neighbouring rows that one program reads from each column of a row-contiguous (transposed) view: with less,
#: memory transactions are partly wasted; with more, a typical weight has too few programs to fill the device.
TRANSPOSED_BYTES = 64
#: Registers of a thread that streams contiguous rows for a small K: three programs fit in a multiprocessor. Left to
#: itself, ptxas aims at 64 for sm_90 in bfloat16, and spills.
STREAM_REGISTERS = 80


@triton.jit
def _load_keys(grad, row, col, stride_row, stride_col, valid, UNIT_STRIDE: tl.constexpr):
    """Keys [rows, cols] of one tile; -1, which is below every key, outside the tensor."""
    pointers = grad + row[:, None] * stride_row
    pointers = pointers + (col[None, :] if UNIT_STRIDE else col.to(tl.int64)[None, :] * stride_col)
    return tl.where(valid, magnitude_key(tl.load(pointers, mask=valid)), -1)


@triton.jit
def _rows_of(block, ROWS: tl.constexpr):
    """The rows of a block: that of the program, unless another kernel, which selects in passing, says which."""
    number = tl.program_id(0).to(tl.int64) if block is None else block
    return number * ROWS + tl.arange(0, ROWS)


@triton.jit
def _store_words(bits, chosen, row, rows, first_word, n_words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Packs flags [ROWS, 32 * WORDS] into the words of the mask from ``first_word`` on."""
    word = first_word + tl.arange(0, WORDS)
    packed = tl.reshape(pack_words(tl.reshape(chosen.to(tl.int32), [ROWS * WORDS * 32]), ROWS * WORDS), [ROWS, WORDS])
    stored = (row < rows)[:, None] & (word < n_words)[None, :]
    tl.store(bits + row[:, None] * n_words + word[None, :], packed, mask=stored)


@triton.jit
def _store_picks(out, picks, row, rows, k, KP: tl.constexpr):
    """Stores the picks [ROWS, KP] in ascending order: the position of each is the number of smaller picks."""
    position = tl.sum((picks[:, None, :] < picks[:, :, None]).to(tl.int32), axis=2)
    stored = (row < rows)[:, None] & (tl.arange(0, KP) < k)[None, :]
    tl.store(out + row[:, None] * k + position, picks, mask=stored)


@triton.jit
def _store_best(
    out, bits, key, kth, wanted, above_before, equal_before, row, rows, first, n, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, WITH_BITS: tl.constexpr,
):  # fmt: skip
    """Stores the columns, from ``first`` on, of keys [ROWS, COLS] above the K-th, and the first ``wanted`` equal to it.

    Returns how many of both kinds each row has had so far, given the counts before this tile.
    """
    above = key > kth[:, None]
    equal = key == kth[:, None]
    # One prefix sum counts both, in the two halves of a word: COLS is below 2**16.
    seen = tl.cumsum(tl.where(above, 0x10000, equal.to(tl.int32)), axis=1)
    seen_above = above_before[:, None] + (seen >> 16)
    seen_equal = equal_before[:, None] + (seen & 0xFFFF)
    chosen = above | (equal & (seen_equal <= wanted[:, None]))
    rank = seen_above + tl.minimum(seen_equal, wanted[:, None]) - 1
    col = tl.broadcast_to((first + tl.arange(0, COLS))[None, :], [ROWS, COLS])
    tl.store(out + row[:, None] * k + rank, col, mask=chosen)
    if WITH_BITS:
        _store_words(bits, chosen, row, rows, first // 32, (n - 1) // 32 + 1, ROWS, COLS // 32)
    above_count = tl.sum(above.to(tl.int32), axis=1)
    return above_before + above_count, equal_before + tl.sum(equal.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["rows"])
def _topk_rounds(
    grad, out, bits, stride_row, stride_col, rows, n, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, KP: tl.constexpr, UNIT_STRIDE: tl.constexpr, WITH_BITS: tl.constexpr,
    block=None,
):  # fmt: skip
    row = _rows_of(block, ROWS)
    col = tl.arange(0, COLS)
    valid = (row < rows)[:, None] & (col < n)[None, :]
    key = _load_keys(grad, row, col, stride_row, stride_col, valid, UNIT_STRIDE)
    NARROW: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth == 16
    if NARROW:  # a key for each column: one reduction yields the largest magnitude and its lowest column
        key = tl.where(valid, (key << 16) | (0xFFFF - col)[None, :], -1)

    picks = tl.full([ROWS, KP], 0x7FFFFFFF, tl.int32)
    for i in range(k):
        best = tl.max(key, axis=1)
        pick = (
            0xFFFF - (best & 0xFFFF) if NARROW else tl.min(tl.where(key == best[:, None], col[None, :], COLS), axis=1)
        )
        picks = tl.where(tl.arange(0, KP)[None, :] == i, pick[:, None], picks)
        key = tl.where(col[None, :] == pick[:, None], -2, key)

    _store_picks(out, picks, row, rows, k, KP)
    if WITH_BITS:
        _store_words(bits, key == -2, row, rows, 0, (n - 1) // 32 + 1, ROWS, COLS // 32)


@triton.jit(do_not_specialize=["rows"])
def _topk_bisect(
    grad, out, bits, stride_row, stride_col, rows, n, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, KEY_BITS: tl.constexpr,
    UNIT_STRIDE: tl.constexpr, WITH_BITS: tl.constexpr,
    block=None,
):  # fmt: skip
    row = _rows_of(block, ROWS)
    col = tl.arange(0, COLS)
    valid = (row < rows)[:, None] & (col < n)[None, :]
    key = _load_keys(grad, row, col, stride_row, stride_col, valid, UNIT_STRIDE)

    # The K-th largest key is the largest number that at least K keys reach.
    kth = tl.zeros([ROWS], key.dtype)
    one = tl.full((), 1, key.dtype)
    for i in range(KEY_BITS):
        candidate = kth | (one << (KEY_BITS - 1 - i))
        kth = tl.where(tl.sum((key >= candidate[:, None]).to(tl.int32), axis=1) >= k, candidate, kth)

    wanted = k - tl.sum((key > kth[:, None]).to(tl.int32), axis=1)
    none = tl.zeros([ROWS], tl.int32)
    if COLS <= CHUNK:
        _store_best(out, bits, key, kth, wanted, none, none, row, rows, 0, n, k, ROWS, COLS, WITH_BITS)
    else:  # ranks and keys together would not fit in the registers; the row is still in the cache
        above_before = none
        equal_before = none
        for chunk in range(COLS // CHUNK):
            part = chunk * CHUNK + tl.arange(0, CHUNK)
            there = (row < rows)[:, None] & (part < n)[None, :]
            part_key = _load_keys(grad, row, part, stride_row, stride_col, there, UNIT_STRIDE)
            above_before, equal_before = _store_best(
                out, bits, part_key, kth, wanted, above_before, equal_before, row, rows, chunk * CHUNK, n, k,
                ROWS, CHUNK, WITH_BITS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _topk_stream_rounds(
    grad, out, bits, stride_row, stride_col, rows, n, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, KP: tl.constexpr, UNIT_STRIDE: tl.constexpr, WITH_BITS: tl.constexpr,
    block=None,
):  # fmt: skip
    row = _rows_of(block, ROWS)
    lane = tl.arange(0, COLS)
    slot = tl.arange(0, KP)
    picks = tl.full([ROWS, KP], 0x7FFFFFFF, tl.int32)
    WIDE: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth == 64
    KEY: tl.constexpr = tl.int64 if WIDE else tl.int32
    # Every pass looks for the largest (key, lowest column) that comes after the last pick; this one comes before all.
    last_key = tl.full([ROWS], 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF, KEY)
    last_col = tl.zeros([ROWS], tl.int32)
    for i in range(k):
        best = tl.full([ROWS, COLS], -1, KEY)
        best_col = tl.zeros([ROWS, COLS], tl.int32)
        for start in range(0, (n - 1) // COLS + 1):
            first = start * COLS
            col = first + lane
            valid = (row < rows)[:, None] & (lane < n - first)[None, :]  # first + lane can pass 2**31
            key = _load_keys(grad, row, col, stride_row, stride_col, valid, UNIT_STRIDE)
            after = (key < last_key[:, None]) | ((key == last_key[:, None]) & (col[None, :] > last_col[:, None]))
            better = after & (key > best)
            best = tl.where(better, key, best)
            best_col = tl.where(better, col[None, :], best_col)
        last_key = tl.max(best, axis=1)
        last_col = tl.min(tl.where(best == last_key[:, None], best_col, 0x7FFFFFFF), axis=1)
        picks = tl.where(slot[None, :] == i, last_col[:, None], picks)

    _store_picks(out, picks, row, rows, k, KP)
    if WITH_BITS:  # the words were zeroed; setting a bit is an OR, so the order of the picks does not matter
        words_before = row[:, None] * ((n - 1) // 32 + 1)
        tl.atomic_or(
            bits + words_before + (picks >> 5), 1 << (picks & 31), mask=(row < rows)[:, None] & (slot < k)[None, :]
        )


@triton.jit(do_not_specialize=["rows"])
def _topk_stream_bisect(
    grad, out, bits, stride_row, stride_col, rows, n, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, KEY_BITS: tl.constexpr, UNIT_STRIDE: tl.constexpr, WITH_BITS: tl.constexpr,
    block=None,
):  # fmt: skip
    row = _rows_of(block, ROWS)
    lane = tl.arange(0, COLS)
    chunks = (n - 1) // COLS + 1
    KEY: tl.constexpr = tl.int64 if KEY_BITS == 63 else tl.int32
    kth = tl.zeros([ROWS], KEY)
    one = tl.full((), 1, KEY)
    reached = tl.zeros([ROWS], tl.int32)  # keys that reach kth + 1, at the end
    for i in range(KEY_BITS):
        candidate = kth | (one << (KEY_BITS - 1 - i))
        count = tl.zeros([ROWS, COLS], tl.int32)
        for start in range(0, chunks):
            first = start * COLS
            valid = (row < rows)[:, None] & (lane < n - first)[None, :]
            key = _load_keys(grad, row, first + lane, stride_row, stride_col, valid, UNIT_STRIDE)
            count += (key >= candidate[:, None]).to(tl.int32)
        total = tl.sum(count, axis=1)
        kth = tl.where(total >= k, candidate, kth)
        reached = tl.where(total >= k, reached, total)

    # A refused candidate is above the K-th key, and the last one refused is the lowest: it is reached by exactly the
    # keys above the K-th, or none was refused and there are none.
    wanted = k - reached
    above_before = tl.zeros([ROWS], tl.int32)
    equal_before = tl.zeros([ROWS], tl.int32)
    for start in range(0, chunks):
        first = start * COLS
        valid = (row < rows)[:, None] & (lane < n - first)[None, :]
        key = _load_keys(grad, row, first + lane, stride_row, stride_col, valid, UNIT_STRIDE)
        above_before, equal_before = _store_best(
            out, bits, key, kth, wanted, above_before, equal_before, row, rows, first, n, k, ROWS, COLS, WITH_BITS
        )


def register_config(n: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of one tile of whole rows: at most 32 registers of keys a thread, so nothing spills.

    Rows of up to 1024 entries get one warp, whose reductions need neither shared memory nor barriers; shorter ones
    share it.
    """
    cols = max(WORD, triton.next_power_of_2(n))
    return max(1, 1024 // cols), cols, max(1, cols * max(4, itemsize) // 4 // 1024)


def stream_config(itemsize: int, transposed: bool) -> tuple[int, int, int]:
    """(rows, columns, warps) of one tile: 16 entries a thread, 4 in float64, whose keys take two registers."""
    entries = 1024 if itemsize == 8 else 4096
    rows = TRANSPOSED_BYTES // itemsize if transposed else 1
    return rows, entries // rows, 8


def stream_options(small: bool, transposed: bool) -> dict[str, int]:
    """What the compiler is told about a kernel that streams."""
    return {"maxnreg": STREAM_REGISTERS} if small and not transposed else {}


def topk(grad: Tensor, k: int, with_bits: bool) -> tuple[Tensor, Tensor | None]:
    """int32 [rows, min(k, n)] and, if asked for, the packed mask int32 [rows, ceil(n / 32)]."""
    rows, n = grad.shape
    k = min(k, n)
    out = torch.empty((rows, k), dtype=torch.int32, device=grad.device)
    itemsize = grad.element_size()
    small = k <= SMALL_K
    # A row-contiguous view is read tile by tile even if its rows are short: its columns would waste the transactions.
    transposed = grad.stride(0) == 1 and grad.stride(1) > 1 and rows > 1
    streamed = transposed or n * max(4, itemsize) > BYTES_IN_REGISTERS
    bits = None
    if with_bits:
        allocate = torch.zeros if streamed and small else torch.empty
        bits = allocate((rows, words(n)), dtype=torch.int32, device=grad.device)
    if out.numel() == 0:
        return out, bits

    strides = grad.stride(0), grad.stride(1)
    flags: dict[str, int] = {"UNIT_STRIDE": grad.stride(1) == 1 or n == 1, "WITH_BITS": with_bits}
    if small:
        flags["KP"] = 1 if k == 1 else SMALL_K
    else:
        flags["KEY_BITS"] = 8 * itemsize - 1
        if not streamed:
            flags["CHUNK"] = RANKED_AT_ONCE
    with on_device(grad):
        if streamed:
            kernel = _topk_stream_rounds if small else _topk_stream_bisect
            tile_rows, tile_cols, warps = stream_config(itemsize, transposed)
            flags |= stream_options(small, transposed)
        else:
            kernel = _topk_rounds if small else _topk_bisect
            tile_rows, tile_cols, warps = register_config(n, itemsize)
        kernel[(triton.cdiv(rows, tile_rows),)](
            grad, out, out if bits is None else bits, *strides, rows, n, k,
            ROWS=tile_rows, COLS=tile_cols, **flags, num_warps=warps,
        )  # fmt: skip
    return out, bits
