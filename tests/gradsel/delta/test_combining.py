"""Deltas combined, compared and printed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradsel
from gradsel.delta.delta import Delta
from gradsel.delta.parts import Part
from gradsel.masks import PerRow, Whole, WholeRows
from gradsel.views import NeuronView
from tests.support.deltas import Odd, assert_same, delta_of, odd_selection, plain, trained


def test_combining():
    (a, base), (b, _) = delta_of(x={0: 1.0, 5: 2.0}), delta_of(x={5: 2.0, 7: 3.0})
    both = a | b
    assert both.trainable_count() == 3
    with both.applied(base):
        assert base.x.view(-1).tolist() == [1, 0, 0, 0, 0, 2, 0, 3]
    assert (a | a) == a
    assert (a | a)["x"].digest == a["x"].digest
    assert a.overlap(b).shared == 1
    clash, _ = delta_of(x={5: 9.0, 7: 3.0})
    with pytest.raises(ValueError, match=r"entries of x.*wins"):
        a | clash
    for wins, value in (("self", 2.0), ("other", 9.0)):
        with a.merged(clash, wins=wins).applied(base):
            assert base.x.view(-1).tolist() == [1, 0, 0, 0, 0, value, 0, 3]
    counted = a.difference(clash)
    assert (counted.a, counted.b, counted.shared, counted.differing) == (2, 2, 1, 1)
    assert "differing" in str(counted)
    with pytest.raises(ValueError, match=r"wins .*'both'"):
        a.merged(b, wins="both")
    with pytest.raises(TypeError):
        a | 3


def test_combining_rows_that_are_not_the_first_dimension():
    """The union again has a fixed number of entries per row, in an order that differs from the tensor's."""
    base = nn.Module()
    base.x = nn.Parameter(torch.zeros(3, 5))
    deltas = []
    for column in (0, 2):
        mask = PerRow(torch.full((5, 1), column, dtype=torch.int32), (3, 5), NeuronView((1,)))
        tuned = copy.deepcopy(base)
        tuned.x.data[column] = torch.arange(5) + 10.0 * column
        deltas.append(Delta.of(tuned, selection=gradsel.Selection({"x": mask}), base=base))
    both = deltas[0] | deltas[1]
    assert both["x"].mask.kind == "per-row"
    assert both["x"].mask.view == NeuronView((1,))
    with both.applied(base):
        assert base.x.tolist() == [[0, 1, 2, 3, 4], [0] * 5, [20, 21, 22, 23, 24]]


def test_combining_other_tensors_and_kinds():
    base, selection, model = trained()
    tuned = plain(model)
    all_of_it = Delta.of(tuned, selection=selection, base=base)
    head = Delta({name: part for name, part in all_of_it.items() if name.startswith("head")})
    rest = Delta({name: part for name, part in all_of_it.items() if not name.startswith("head")})
    assert (head | rest) == all_of_it
    odd, odd_base = Odd(), odd_selection()
    with torch.no_grad():
        changed = copy.deepcopy(odd)
        for p in changed.parameters():
            p.add_(torch.randn_like(p))
        kept = copy.deepcopy(odd)
        other = odd_selection()  # other columns
        for name, parameter in kept.named_parameters():
            for mask in (odd_base[name], other[name]):
                mask.scatter_(parameter, mask.gather(dict(changed.named_parameters())[name]))
    known = dict(odd.named_parameters())

    def taken(selection):
        tuned = copy.deepcopy(odd)
        for name, parameter in tuned.named_parameters():
            selection[name].scatter_(parameter.data, selection[name].gather(changed.get_parameter(name).data))
        return Delta.of(tuned, selection=selection, base=known)

    merged = taken(odd_base) | taken(other)
    with merged.applied(odd):
        assert_same(odd, kept.state_dict())


def test_deltas_of_other_bases_do_not_combine():
    a, _ = delta_of(x={0: 1.0})
    other = nn.Module()
    other.x = nn.Parameter(torch.ones(2, 4))
    tuned = copy.deepcopy(other)
    tuned.x.data[1, 1] = 4
    with pytest.raises(ValueError, match=r"bases .*x"):
        a | Delta.of(tuned, base=other)
    tall = nn.Module()
    tall.x = nn.Parameter(torch.zeros(4, 4))
    for operation in (a.overlap, a.difference, a.merged):
        with pytest.raises(ValueError, match=r"x .*2x4 .*4x4"):
            operation(Delta.of(tall, selection=gradsel.Selection({"x": Whole((4, 4))})))


def test_equality_is_that_of_bits():
    a, _ = delta_of(x={0: 1.0})
    assert a != delta_of(x={0: 2.0})[0]
    assert a != delta_of(x={1: 1.0})[0]
    assert a != delta_of(y={0: 1.0})[0]
    assert delta_of(x={0: 0.0})[0] != delta_of(x={0: -0.0})[0]
    assert a != 3


def test_tables():
    _, selection, model = trained("rows")
    text = str(Delta.of(model, notes={"task": "toys"}))
    assert "blocks.*.qkv.weight  x2" in text
    assert f"{selection.trainable_count():,} entries" in text
    assert "task: toys" in text
    assert WholeRows.kind in text
    assert repr(Delta.of(model)).startswith(f"Delta({selection.trainable_count():,} entries of ")


# --- Deltas saved in different dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_rounded_delta_agrees_with_the_exact_one(narrow):
    _, _, model = trained()
    exact, rounded = Delta.of(model), Delta.of(model, dtype=narrow)
    for a, b in ((exact, rounded), (rounded, exact)):
        found = a.difference(b)
        assert found.shared == exact.trainable_count()
        assert found.differing == 0
        assert (a | b) == exact  # the more exact values are taken
    assert exact != rounded
    with torch.no_grad():
        model.head.bias[1] *= 1.5
    assert Delta.of(model).difference(rounded).differing == 1


def test_neither_of_two_narrow_dtypes_is_the_other_rounded():
    values = torch.tensor([1.0, 1 + 2**-9, 65536.0])  # the second is no bfloat16, the third no float16
    made = [
        Delta({"x": replace(part, values=values.to(dtype))})
        for dtype in (torch.bfloat16, torch.float16)
        for part in [Part(Whole((3,)), values, torch.float32)]
    ]
    assert made[0].difference(made[1]).differing == 0  # float16 rounds to bfloat16, bfloat16 to infinity
    off = Delta({"x": replace(made[0]["x"], values=torch.tensor([1.5, 1.0, 2.0]).bfloat16())})
    assert off.difference(made[1]).differing == 2


# --- Two tasks in one --------------------------------------------------------------------------------------------


def head(classes, value):
    shapes = {"head.weight": (classes, 4), "head.bias": (classes,)}
    return Delta({n: Part(Whole(s), torch.full(s, float(value)), torch.float32) for n, s in shapes.items()})


def test_heads_of_two_sizes_are_merged_by_rule_only():
    a, _ = delta_of(x={0: 1.0})
    b, _ = delta_of(x={3: 2.0})
    first, second = a | head(3, 1), b | head(5, 2)
    with pytest.raises(ValueError, match=r"head\.weight whole, to sizes 3x4 and 5x4; say which wins"):
        first | second
    for wins, size in (("self", 3), ("other", 5)):
        merged = first.merged(second, wins=wins)
        assert merged["head.weight"].mask.shape == (size, 4)
        assert merged["head.bias"].mask.shape == (size,)
        assert merged["x"].mask.nnz == 2
    assert first.difference(second).shared == 0


def test_originals_of_both_are_kept(tmp_path):
    a, _ = delta_of(x={0: 1.0, 5: 2.0})
    b, _ = delta_of(x={5: 2.0, 7: 3.0}, y={1: 4.0})
    merged = a | b
    merged.save(tmp_path / "d", originals=True)
    assert Delta.load(tmp_path / "d")["x"].originals.tolist() == [0.0, 0.0, 0.0]
    unknown = Delta({name: replace(part, originals=None) for name, part in b.items()})
    assert (a | unknown)["x"].originals is None
