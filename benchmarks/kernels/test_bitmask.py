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


def test_bits_to_cols(contest):
    """Every K has a mask of its own, so the baseline depends on K here."""
    torch.manual_seed(0)
    grad, contenders = torch.randn(3072, 768), {}
    for k in (1, 8):
        _, bits = gk.topk_rows_bits(grad, k)
        mask = gk.unpack_bits(bits, 768)
        contenders[k] = {
            "mask.nonzero": (lambda mask=mask: mask.nonzero(), mask.nbytes),
            "native": (lambda bits=bits, k=k: gk.bits_to_cols(bits, k), bits.nbytes + 3072 * k * 4),
        }
    contest("bits_to_cols", "3072x768", "bool", contenders)
