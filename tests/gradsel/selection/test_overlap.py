"""Selections compared and combined."""

from __future__ import annotations

import math

import pytest
import torch

import gradsel
from gradsel.masks import Frozen, PerRow, Whole
from tests.gradsel.selection.cases import int32, random_selection, selection_of
from tests.support.toy import Toy, batches, cross_entropy


def test_overlap_agrees_with_the_dense_masks():
    a, b = random_selection(0), random_selection(1, k=3)
    overlap = a.overlap(b)
    ranked = [name for name, mask in a.items() if not mask.is_whole]
    dense = {name: (a[name].to_dense(), b[name].to_dense()) for name in a}
    assert set(overlap.parameters) == set(ranked)
    for name in ranked:
        x, y = dense[name]
        part = overlap.parameters[name]
        assert (part.shared, part.a, part.b) == (int((x & y).sum()), int(x.sum()), int(y.sum()))
    shared = sum(int((x & y).sum()) for name, (x, y) in dense.items() if name in ranked)
    either = sum(int((x | y).sum()) for name, (x, y) in dense.items() if name in ranked)
    assert 0 < overlap.shared == shared
    assert overlap.share == shared / sum(a[name].nnz for name in ranked)
    assert overlap.jaccard == shared / either
    everything = a.overlap(b, whole=True)
    assert everything.shared == shared + sum(mask.nnz for mask in a.values() if mask.is_whole)
    assert f"{100 * overlap.jaccard:.1f} %" in str(overlap).splitlines()[-1]
    assert "blocks.0.fc1.weight" in str(overlap)
    assert "head" not in str(overlap)
    assert (a.overlap(a).share, a.overlap(a).jaccard) == (1, 1)
    nothing = selection_of(w=Frozen((2, 3)))
    assert math.isnan(nothing.overlap(nothing).share)
    one_sided = selection_of(w=PerRow(int32([0], [1]), (2, 3))), selection_of(w=Whole((2, 3)))
    for x, y in (one_sided, one_sided[::-1]):
        assert not x.overlap(y).parameters
        assert x.overlap(y, whole=True).shared == 2
    with pytest.raises(AttributeError):
        overlap.shared = 3


@pytest.mark.parametrize(
    "combine", [lambda a, b: a.overlap(b), lambda a, b: a | b, lambda a, b: a & b, lambda a, b: a - b]
)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            selection_of(**{"fc.weight": Whole((2, 3))}),
            selection_of(**{"fc1.weight": Whole((2, 3))}),
            r"other .*1 parameter \(fc\.weight\).*fc1\.weight\?.*1 parameter \(fc1\.weight",
        ),
        (
            selection_of(w=Whole((2, 3))),
            selection_of(w=Whole((3, 2))),
            "shapes .*1 parameter .*w .*2x3 .*3x2",
        ),
        (
            selection_of(**{f"w{i}": Whole((2,)) for i in range(5)}),
            selection_of(w0=Whole((2,))),
            r"4 parameters \(w1, w2, w3 .*1 more",
        ),
    ],
)
def test_selections_of_different_models_are_refused(combine, a, b, message):
    with pytest.raises(ValueError, match=message):
        combine(a, b)


def test_set_operations_combine_every_parameter():
    a, b = random_selection(0), random_selection(1)
    for combined, dense in [
        (a | b, torch.logical_or),
        (a & b, torch.logical_and),
        (a - b, lambda x, y: x & ~y),
    ]:
        assert list(combined) == list(a)
        for name, mask in combined.items():
            assert torch.equal(mask.to_dense(), dense(a[name].to_dense(), b[name].to_dense())), name
    assert (a | a).by_block() == a.by_block()
    assert {name: mask.kind for name, mask in (a & a).items()} == {name: mask.kind for name, mask in a.items()}
    assert not any(mask.nnz for mask in (a - a).values())
    assert (a - a)["blocks.0.norm.weight"].label == "normalisation"
    assert ((a - a) | a).overlap(a, whole=True).jaccard == 1


def test_notes_say_what_a_selection_was_made_of():
    made = random_selection(0) | (random_selection(1) - random_selection(2))
    policy = made.notes["policy"]
    assert policy.count("PerNeuron(k=2)") == 3
    assert "] or [policy [" in policy
    assert "] without [" in policy
    assert policy in str(made)


def test_only_selections_are_combined():
    with pytest.raises(TypeError, match="unsupported operand"):
        random_selection(0) | {}


def test_fingerprints_of_a_combination_are_those_that_agree():
    a = gradsel.Selection({name: Whole((2,)) for name in "xyz"}, base={"x": "1", "y": "2"})
    b = gradsel.Selection({name: Whole((2,)) for name in "xyz"}, base={"y": "3", "z": "4"})
    assert (a | b).base == {"x": "1", "z": "4"}


def test_a_union_of_tasks_trains_attached():
    model = Toy()
    selection = random_selection(0) | random_selection(1)
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1)
    before = model.blocks[0].fc1.weight.detach().clone()
    cross_entropy(model, batches()[0]).backward()
    optimizer.step()
    gradsel.detach(model)
    moved = model.blocks[0].fc1.weight.detach() != before
    assert moved.any()
    assert not (moved & ~selection["blocks.0.fc1.weight"].to_dense()).any()


def test_equality_is_that_of_entries_and_kinds():
    one, same, other = (gradsel.select(Toy(), None, None, criterion=gradsel.random_scores(s)) for s in (0, 0, 1))
    assert one == same
    assert one != other
    assert one != gradsel.Selection({**one, "head.weight": Frozen((4, 12))})
    assert one != 3
