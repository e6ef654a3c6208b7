"""A delta is applied to the base it was made on, and to no other."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import gradsel
from gradsel.delta.delta import Delta, load_delta, save_delta
from gradsel.delta.parts import bits_of
from tests.support.deltas import assert_same, frozen_copy, plain, trained
from tests.support.selections import check_consistent, toy
from tests.support.toy import Toy


@pytest.mark.parametrize("where", ["selected", "probe", "elsewhere"])
def test_a_modified_base_is_refused_by_name(where):
    base, selection, model = trained()
    delta = Delta.of(model)
    name = "blocks.0.fc1.weight"
    weight = base.get_parameter(name)
    entries = delta[name].mask.entries()
    probes = torch.arange(32) * weight.numel() // 32
    taken = set(entries.tolist())
    place = {
        "selected": int(entries[3]),
        "probe": next((p for p in probes.tolist() if p not in taken), -1),
        "elsewhere": next((p for p in range(weight.numel()) if p not in taken and p not in probes.tolist()), -1),
    }[where]
    with torch.no_grad():
        bits_of(weight).view(-1)[place] ^= 1  # the last bit of one entry
    state = frozen_copy(base)
    message = f"1 of {len(delta)} tensors .*{re.escape(name)}"
    with pytest.raises(ValueError, match=message):
        delta.check(base)
    if where == "elsewhere":  # as documented, applying samples only a few of the frozen entries
        delta.apply_(base).revert_()
    else:
        with pytest.raises(ValueError, match=message):
            delta.apply_(base)
        assert_same(base, state)
        with delta.applied(base, force=True):
            assert_same(base, {**plain(model).state_dict(), name: base.state_dict()[name]})
    assert_same(base, state)
    gradsel.attach(base, selection)
    if where != "elsewhere":
        with pytest.raises(ValueError, match=message):
            load_delta(base, delta)
        load_delta(base, delta, force=True)
        check_consistent(base)
        gradsel.detach(base, restore=True)
        assert_same(base, state)


def test_other_models_are_refused_and_stay_as_they_are():
    base, _, model = trained()
    delta = Delta.of(model)
    other = Toy(classes=7)
    state = frozen_copy(other)
    with pytest.raises(ValueError, match=r"head\.weight .*4x12 .*7x12 .*number of classes"):
        delta.apply_(other)
    with pytest.raises(ValueError, match=r"'patch_embed\.weight'"):
        delta.apply_(nn.Linear(2, 2))
    assert_same(other, state)
    half = copy.deepcopy(base).bfloat16()
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*torch\.float32"):
        delta.apply_(half)
    state = frozen_copy(half)
    with delta.applied(half, force=True):
        assert_same(half, {**state, **{n: t.bfloat16() for n, t in plain(model).state_dict().items() if n in delta}})
    assert_same(half, state)
    with pytest.raises(ValueError, match=r"attached.*load_delta"):
        delta.apply_(model)


def test_values_that_the_weight_cannot_hold():
    base, selection = toy(dtype=torch.float16)
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    with torch.no_grad():
        model.blocks[0].fc1.weight_values[0, 0] = 1e6
    delta = Delta.of(model)
    with pytest.raises(ValueError, match=r"torch\.float16.*blocks\.0\.fc1\.weight .*1 value.*NaN"):
        delta.apply_(base)
    delta.apply_(base, force=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_needs_force_on_every_way(bad, tmp_path):
    base, _, model = trained()
    with torch.no_grad():
        model.head.bias[2] = bad
    with pytest.raises(ValueError, match=r"head\.bias .*1 value.*NaN .*force=True"):
        save_delta(model, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    made = Delta.of(model)
    made.save(tmp_path / "d", force=True)
    with pytest.raises(ValueError, match=r"head\.bias .*1 value.*NaN"):
        load_delta(base, tmp_path / "d")
    loaded = Delta.load(tmp_path / "d", force=True)
    assert loaded == made  # compares bits
    loaded.apply_(base)
    assert_same(base, plain(model).state_dict())
