"""Kernels for packed bitmasks: packing and unpacking."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsel_kernels._checks import words
from gradsel_kernels.triton.common import on_device, pack_words

#: Columns that one program packs or unpacks: one byte each, so that every thread of two warps accesses 16 bytes.
COLS = 1024


@triton.jit(do_not_specialize=["chunks"])
def _pack(mask, bits, stride_row, stride_col, n, chunks, COLS: tl.constexpr, UNIT_STRIDE: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    col = chunk * COLS + tl.arange(0, COLS)
    base = mask + row * stride_row
    # Nothing is read past the last column. Comparing col itself would fail past 2**31, where it wraps.
    flag = tl.load(
        base + col if UNIT_STRIDE else base + col.to(tl.int64) * stride_col,
        mask=tl.arange(0, COLS) < n - chunk * COLS, other=0,
    )  # fmt: skip
    n_words = (n - 1) // 32 + 1
    word = chunk * (COLS // 32) + tl.arange(0, COLS // 32)
    tl.store(bits + row * n_words + word, pack_words(flag.to(tl.int32), COLS // 32), mask=word < n_words)


@triton.jit(do_not_specialize=["chunks"])
def _unpack(bits, mask, stride_row, stride_col, n, chunks, COLS: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    word = chunk * (COLS // 32) + tl.arange(0, COLS // 32)
    packed = tl.load(bits + row * stride_row + word.to(tl.int64) * stride_col, mask=word < (n - 1) // 32 + 1, other=0)
    flag = tl.reshape((packed[:, None] >> tl.arange(0, 32)[None, :]) & 1, [COLS])
    lane = tl.arange(0, COLS)
    tl.store(mask + row * n + chunk * COLS + lane, flag.to(tl.int1), mask=lane < n - chunk * COLS)


def pack_bits(mask: Tensor) -> Tensor:
    rows, n = mask.shape
    bits = torch.empty((rows, words(n)), dtype=torch.int32, device=mask.device)
    if bits.numel():
        chunks = triton.cdiv(n, COLS)
        with on_device(mask):
            _pack[(rows * chunks,)](
                mask, bits, mask.stride(0), mask.stride(1), n, chunks,
                COLS=COLS, UNIT_STRIDE=mask.stride(1) == 1, num_warps=2,
            )  # fmt: skip
    return bits


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    rows = bits.shape[0]
    mask = torch.empty((rows, n), dtype=torch.bool, device=bits.device)
    if mask.numel():
        chunks = triton.cdiv(n, COLS)
        with on_device(bits):
            _unpack[(rows * chunks,)](bits, mask, bits.stride(0), bits.stride(1), n, chunks, COLS=COLS, num_warps=2)
    return mask
