"""Packing and unpacking of every backend against the specification."""

from __future__ import annotations

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels import reference
from tests.kernels import cases

SHAPES = [*cases.SHAPES, *cases.LONG_SHAPES[:1]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("view", cases.VIEWS, ids=lambda v: v.__name__)
def test_pack_and_unpack(fast, shape, view):
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = cases.random_mask(*shape, density)
        bits = gk.pack_bits(view(mask).to(fast))
        assert bits.dtype == torch.int32
        assert torch.equal(bits.cpu(), reference.pack_bits(mask))
        back = gk.unpack_bits(view(bits) if view is not cases.transposed else bits, shape[1])
        assert back.dtype == torch.bool
        assert torch.equal(back.cpu(), mask)


def test_word_layout():
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[0, [0, 5, 31, 32, 69]] = True
    assert reference.pack_bits(mask).tolist() == [[(1 << 0 | 1 << 5) - 2**31, 1, 1 << 5]]


def test_spare_bits_are_ignored_when_unpacking(fast):
    bits = torch.full((2, 1), -1, dtype=torch.int32, device=fast)
    assert gk.unpack_bits(bits, 5).tolist() == [[True] * 5] * 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gk.pack_bits(torch.ones(2, 3)), TypeError, "mask.*bool.*float32"),
        (lambda: gk.pack_bits(torch.ones(3, dtype=torch.bool)), ValueError, "mask.*2-D"),
        (lambda: gk.unpack_bits(torch.ones(2, 2), 40), TypeError, "bits.*int32"),
        (lambda: gk.unpack_bits(torch.ones(2, 2, dtype=torch.int32), 65), ValueError, "33 to 64"),
        (lambda: gk.unpack_bits(torch.ones(2, 2, dtype=torch.int32), 32), ValueError, "1 words"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
