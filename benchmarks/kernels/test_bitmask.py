"""Packing and unpacking bitmasks, against a copy of the boolean mask, which is the bound."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk

SIZES = [(3072, 768), (4096, 14336)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pack(contest, size):
    torch.manual_seed(0)
    mask = torch.rand(size) < 0.01
    target = torch.empty_like(mask)
    providers = {
        "mask.copy_": (lambda: target.copy_(mask), 2 * mask.nbytes),
        "native": (lambda: gk.pack_bits(mask), mask.nbytes * 9 // 8),
    }
    contest("pack_bits", f"{size[0]}x{size[1]}", "bool", {0: providers})


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_unpack(contest, size):
    torch.manual_seed(0)
    mask = torch.rand(size) < 0.01
    bits = gk.pack_bits(mask)
    target = torch.empty_like(mask)
    providers = {
        "mask.copy_": (lambda: target.copy_(mask), 2 * mask.nbytes),
        "native": (lambda: gk.unpack_bits(bits, size[1]), mask.nbytes * 9 // 8),
    }
    contest("unpack_bits", f"{size[0]}x{size[1]}", "bool", {0: providers})
