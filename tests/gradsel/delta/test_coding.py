"""Gaps between indices, and the choice of the smallest encoding."""

from __future__ import annotations

import pytest
import torch

from gradsel.delta.coding import from_gaps, packed, to_gaps, unpacked
from gradsel.masks import Flat, PerRow, WholeColumns, WholeRows, same
from gradsel.views import NeuronView
from tests.support.deltas import cols


def test_gaps_by_hand():
    assert to_gaps(torch.tensor([0, 7, 299]), torch.uint8).tolist() == [0, 6, 255, 36]
    assert to_gaps(torch.tensor([254, 510]), torch.uint8).tolist() == [254, 255, 0]
    assert to_gaps(torch.tensor([65535, 65536 * 3]), torch.uint16).tolist() == [65535, 0, 65535, 65535, 2]
    assert from_gaps(torch.tensor([0, 6, 255, 36], dtype=torch.uint8)).tolist() == [0, 7, 299]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("end", [3, 300, 10**6, 2**40])
def test_gaps_come_back(dtype, end):
    generator = torch.Generator().manual_seed(end)
    for _ in range(20):
        count = int(torch.randint(1, 40, (), generator=generator))
        numbers = torch.randint(0, min(end, 10**7), (count,), generator=generator).unique()
        numbers[-1:] += (end - 1 - numbers[-1]) * (end <= 10**7)  # the very last entry
        assert torch.equal(from_gaps(to_gaps(numbers, dtype)), numbers)


@pytest.mark.parametrize(
    ("gaps", "error", "message"),
    [
        (torch.tensor([1, 255], dtype=torch.uint8), ValueError, "last gap"),
        (torch.tensor([], dtype=torch.uint8), ValueError, r"vector .*\[0\]"),
        (torch.tensor([[1]], dtype=torch.uint8), ValueError, r"vector .*\[1, 1\]"),
        (torch.tensor([1], dtype=torch.int32), TypeError, r"uint8 or uint16.*torch\.int32"),
    ],
)
def test_gaps_that_mean_nothing(gaps, error, message):
    with pytest.raises(error, match=message):
        from_gaps(gaps)


@pytest.mark.parametrize(
    ("mask", "part", "dtype"),
    [
        (PerRow(cols(6, 3000, 1), (6, 3000)), "cols", "uint16"),
        (PerRow(cols(6, 70_000, 1), (6, 70_000)), "gaps", "uint16"),  # columns would need int32
        (PerRow(cols(6, 300, 10), (6, 300)), "gaps", "uint8"),
        (PerRow(cols(6, 300, 100), (6, 300)), "bits", "int32"),
        (PerRow(cols(6, 300, 10), (300, 6), NeuronView((1,))), "gaps", "uint8"),
        (PerRow(cols(2, 10**7, 1), (2, 10**7)), "cols", "int32"),
        (Flat(torch.tensor([0, 7, 299]), (6, 50)), "gaps", "uint8"),
        (Flat(torch.arange(2, 600), (6, 100)), "bits", "int32"),
        (Flat(torch.tensor([5, 90_000_000]), (10_000, 10_000)), "indices", "int32"),
        (WholeRows(torch.tensor([1, 4], dtype=torch.int32), (6, 5)), "rows", "uint16"),
        (WholeColumns(torch.tensor([1], dtype=torch.int32), (6, 5)), "cols", "uint16"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_smallest_encoding_comes_back(mask, part, dtype):
    ((found, tensor),) = packed(mask).items()
    assert (found, str(tensor.dtype)) == (part, f"torch.{dtype}")
    assert same(unpacked(mask.kind, list(mask.shape), mask.describe(), {found: tensor}), mask)
    if part == "gaps":
        assert tensor.nbytes < sum(t.nbytes for t in mask.packed().values())
