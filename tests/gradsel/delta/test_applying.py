"""Deltas applied on top of each other, reverted, and loaded into attached models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsel
from gradsel.delta.delta import Delta, load_delta, save_delta
from gradsel.delta.parts import same_bits
from gradsel.masks import Frozen
from tests.support.deltas import DTYPES, assert_same, frozen_copy, plain, train, trained
from tests.support.selections import KINDS, check_consistent, data, random_selection, toy
from tests.support.toy import cross_entropy

# --- Applied on top of each other --------------------------------------------------------------------------------


def two():
    base, _, model = trained()
    other = copy.deepcopy(base)
    gradsel.attach(other, random_selection(base, k=3, freeze=["*"], rank=["blocks.*.qkv.weight"]))
    return base, Delta.of(model), Delta.of(train(other))


def test_nested_deltas_of_separate_entries_revert_in_any_order():
    base, selection = toy()
    parts = []
    for name in ("blocks.0.fc1.weight", "blocks.1.fc1.weight"):
        tuned = copy.deepcopy(base)
        own = {n: m if n == name else Frozen(m.shape) for n, m in selection.items()}
        gradsel.attach(tuned, gradsel.Selection(own))
        parts.append(Delta.of(train(tuned)))
    before = frozen_copy(base)
    first, second = parts[0].apply_(base), parts[1].apply_(base)
    first.revert_()
    second.revert_()
    assert_same(base, before)
    with parts[0].applied(base), parts[1].applied(base):
        assert_same(base, {**before, **{k: base.state_dict()[k] for part in parts for k in part}})
    assert_same(base, before)


def test_out_of_order_is_refused():
    base, a, b = two()
    before = frozen_copy(base)
    first = a.apply_(base)
    between = frozen_copy(base)
    with pytest.raises(ValueError, match=r"of \d+ tensors"):
        a.apply_(base)  # because it has already modified its own entries
    second = b.apply_(base, force=True)
    both = frozen_copy(base)
    with pytest.raises(RuntimeError, match=r"Applied\(.*\) .*on top of"):
        first.revert_()
    assert_same(base, both)
    second.revert_()
    assert_same(base, between)
    first.revert_()
    assert_same(base, before)
    with pytest.raises(RuntimeError, match="reverted"):
        first.revert_()


def test_a_forgotten_handle_is_in_nobodys_way():
    base, a, b = two()
    first = a.apply_(base)
    b.apply_(base, force=True)  # the handle that could revert it is dropped
    with pytest.raises(RuntimeError, match="changed"):
        first.revert_()
    first.revert_(force=True)


def test_changes_after_applying_are_noticed():
    base, a, _ = two()
    handle = a.apply_(base)
    with torch.no_grad():
        base.head.bias[0] += 1
    state = frozen_copy(base)
    with pytest.raises(RuntimeError, match=r"1 tensor.*changed .*head\.bias"):
        handle.revert_()
    assert_same(base, state)
    base.bfloat16()
    with pytest.raises(RuntimeError, match="moved"):
        handle.revert_(force=True)


def test_autograd_notices_weights_written_in_between():
    base, a, _ = two()
    loss = cross_entropy(base, data()[0])
    a.apply_(base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_exception_inside_reverts_too():
    base, a, _ = two()
    before = frozen_copy(base)
    with pytest.raises(KeyError), a.applied(base):
        raise KeyError
    assert_same(base, before)


@pytest.mark.supports("torch.compile", "delta")
def test_a_wrapped_model_is_written_by_its_own_names():
    base, a, _ = two()
    before = frozen_copy(base)
    wrapped = torch.compile(base, backend="eager")
    with a.applied(wrapped):
        assert not same_bits(base.head.bias, before["head.bias"])
    assert_same(base, before)


# --- Attached models ---------------------------------------------------------------------------------------------


@pytest.mark.supports("CPU", "save/load", "delta")
@pytest.mark.supports("bf16", "delta")
@pytest.mark.supports("fp16", "delta")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_loaded_delta(kind, dtype, tmp_path):
    base, _, model = trained(kind, dtype)
    before = frozen_copy(base)
    save_delta(model, tmp_path / "d")
    delta = Delta.load(tmp_path / "d")
    again = copy.deepcopy(base)
    gradsel.attach(again, delta.selection(again))
    assert load_delta(again, tmp_path / "d") is None
    check_consistent(again)
    assert_same(again, model.state_dict())
    assert Delta.of(again) == delta
    assert [part.digest for part in Delta.of(again).values()] == [part.digest for part in delta.values()]
    train(model, seed=1)
    train(again, seed=1)
    assert_same(again, model.state_dict())
    assert_same(gradsel.detach(again, restore=True), before)


def test_other_entries_are_refused_and_a_way_out_is_named():
    base, _, model = trained()
    delta = Delta.of(model)
    other = copy.deepcopy(base)
    gradsel.attach(other, random_selection(base, k=1, freeze=["unused.*"]))
    state = frozen_copy(other)
    with pytest.raises(ValueError, match=r"patch_embed\.weight.*gradsel\.detach"):
        load_delta(other, delta)
    assert_same(other, state)
    gradsel.detach(other, restore=True)
    gradsel.attach(other, delta.selection(other))
    load_delta(other, delta)
    assert_same(plain(other), plain(model).state_dict())


def test_a_delta_made_with_a_selection_alone_loads_into_an_attached_model():
    base, _ = toy()
    selection = gradsel.select(base, None, None, gradsel.PerNeuron(1), "random", freeze=["unused.*"], progress=False)
    attached = copy.deepcopy(base)
    gradsel.attach(attached, selection)
    delta = Delta.of(plain(train(attached)), selection=selection)
    fresh = copy.deepcopy(base)
    gradsel.attach(fresh, selection)
    load_delta(fresh, delta)
    assert_same(plain(fresh), plain(attached).state_dict())


def test_two_attached_parts_have_no_one_delta():
    one, selection = toy()
    other = copy.deepcopy(one)
    gradsel.attach(one, selection)
    gradsel.attach(other, selection)
    with pytest.raises(ValueError, match="2 modules"):
        Delta.of(nn.ModuleList([one, other]))
    assert Delta.of(nn.Sequential(one)).keys() == Delta.of(one).keys()


def test_models_without_entries_and_models_around_the_base_are_told_apart():
    base, _, model = trained()
    delta = Delta.of(model)
    with pytest.raises(ValueError, match=r"on the meta device.*load the base's weights first"):
        delta.apply_(copy.deepcopy(base).to("meta"))
    around = nn.Module()
    around.backbone = base
    with pytest.raises(ValueError, match=r"another model; its part 'backbone' has one: pass that part"):
        delta.apply_(around)
    delta.apply_(around.backbone)
