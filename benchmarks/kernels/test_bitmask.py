"""Packing and unpacking bitmasks, against a copy of the boolean mask (the bound)."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk

SIZES = [(3072, 768), (4096, 14336)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pack(compare, size):
    torch.manual_seed(0)
    mask = torch.rand(size) < 0.01
    target = torch.empty_like(mask)
    moved = mask.nbytes * 9 // 8
    compare(
        "pack_bits",
        f"{size[0]}x{size[1]}",
        "bool",
        0,
        {"mask.copy_": (lambda: target.copy_(mask), 2 * mask.nbytes), "native": (lambda: gk.pack_bits(mask), moved)},
    )


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_unpack(compare, size):
    torch.manual_seed(0)
    mask = torch.rand(size) < 0.01
    bits = gk.pack_bits(mask)
    target = torch.empty_like(mask)
    moved = mask.nbytes * 9 // 8
    compare(
        "unpack_bits",
        f"{size[0]}x{size[1]}",
        "bool",
        0,
        {
            "mask.copy_": (lambda: target.copy_(mask), 2 * mask.nbytes),
            "native": (lambda: gk.unpack_bits(bits, size[1]), moved),
        },
    )


@pytest.mark.parametrize("k", [1, 8])
def test_bits_to_cols(compare, k):
    torch.manual_seed(0)
    _, bits = gk.topk_rows_bits(torch.randn(3072, 768), k)
    mask = gk.unpack_bits(bits, 768)
    compare(
        "bits_to_cols",
        "3072x768",
        "bool",
        k,
        {
            "mask.nonzero": (lambda: mask.nonzero(), mask.nbytes),
            "native": (lambda: gk.bits_to_cols(bits, k), bits.nbytes + 3072 * k * 4),
        },
    )
