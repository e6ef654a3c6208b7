"""Memory grows with the entries in a file, not with the shapes that it claims."""

from __future__ import annotations

import pytest
import torch

import gradsel
from gradsel.delta.delta import Delta
from gradsel.delta.parts import Part
from gradsel.masks import Flat, PerRow, WholeColumns, WholeRows
from gradsel.masks.encoding import cols_of, indices_of
from gradsel.views import NeuronView
from tests.support.deltas import cols
from tests.support.memory import peak_bytes


@pytest.mark.parametrize("mask", ["per-row", "columns", "irregular", "rows"])
def test_memory_grows_with_entries_and_not_with_the_shape_that_a_file_claims(mask):
    """Every view of a weight that would take 2**40 entries."""
    one = torch.zeros(1, dtype=torch.int32)
    masks = {
        "per-row": PerRow(one.view(1, 1), (2**40, 1), NeuronView((1,))),
        "columns": WholeColumns(one, (2**40, 1), NeuronView((1,))),
        "irregular": Flat(torch.tensor([5]), (2**20, 2**20)),
        "rows": WholeRows(one, (1, 2**40), NeuronView((1,))),
    }
    found = masks[mask]
    delta = Delta({"x": Part(found, torch.ones(found.compact_shape), torch.float32)})
    other = Delta({"x": Part(found, torch.zeros(found.compact_shape), torch.float32)})

    def use():
        assert delta.difference(other).differing == 1
        assert delta.merged(other, wins="self").trainable_count() == 1
        assert delta.overlap(delta).shared == 1
        str(delta)

    use()  # imports, for once
    assert peak_bytes(use) < 100_000


@pytest.mark.parametrize(
    ("shape", "view"), [((4, 6), (1,)), ((3, 4, 5), (0, 2)), ((3, 4, 5), (2,)), ((4, 3, 2), (0, 2, 1))]
)
def test_entries_are_those_of_the_dense_mask(shape, view):
    view = NeuronView(view)
    rows, n = view.shape(shape)
    for mask in (
        PerRow(cols(rows, n, min(2, n)), shape, view),
        WholeRows(torch.tensor([1], dtype=torch.int32), shape, view),
        WholeColumns(torch.tensor([0], dtype=torch.int32), shape, view),
    ):
        numbered = torch.arange(mask.numel, dtype=torch.float64).view(shape)
        assert torch.equal(mask.ordered_entries(), mask.gather(numbered).view(-1).long())
        assert torch.equal(mask.entries(), mask.to_dense().reshape(-1).nonzero().view(-1))
        assert torch.equal(view.numbers(view.places(mask.numbers(), shape), shape), mask.numbers())


def test_shapes_up_to_the_largest_number_of_entries(tmp_path):
    """2**61 entries of 8 bytes have more bytes than an integer holds."""
    mask = PerRow(torch.zeros(1, 1, dtype=torch.int32), (2**61, 1), NeuronView((1,)))
    delta = Delta({"x": Part(mask, torch.ones(1, 1), torch.float32)})
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    assert loaded == delta
    assert loaded.difference(delta).shared == 1
    assert (loaded | delta) == delta


def test_bits_are_unpacked_to_the_entries_and_little_more():
    """A selection file of 1 MiB with 8 million entries, all but one of them set."""
    bits = torch.full((1, 2**18), -1, dtype=torch.int32)
    bits[0, 7] = 0x7FFFFFFF
    found = []
    taken = peak_bytes(lambda: found.append(indices_of(bits, 2**23)))
    assert found[0].numel() == 2**23 - 1
    assert found[0][-1] == 2**23 - 1
    assert int(found[0][255]) == 256
    assert taken < 4 * 2**23 + 2**24
    rows = bits.view(64, -1).clone()
    rows[:, 7] = 0x7FFFFFFF
    assert torch.equal(cols_of(rows, (64, 2**17))[63], found[0][: 2**17 - 1])


def test_a_selection_is_as_large_as_its_entries(tmp_path):
    selection = gradsel.Selection({"x": WholeRows(torch.tensor([3], dtype=torch.int32), (2**30, 2**30))})
    selection.save(tmp_path / "s")

    def use():
        assert gradsel.Selection.load(tmp_path / "s").trainable_count() == 2**30
        str(selection)

    use()
    assert peak_bytes(use) < 100_000
