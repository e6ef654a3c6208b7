"""What trained models bring along: running statistics, tied tensors, heads, and dtypes that no delta can hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsel
from gradsel.delta.delta import Delta, load_delta, save_delta
from gradsel.delta.parts import Part, same_bits
from gradsel.masks import Whole
from tests.support.deltas import assert_same, frozen_copy, train, trained
from tests.support.selections import data, random_selection, toy
from tests.support.toy import Toy

STATISTICS = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}

# --- Buffers -----------------------------------------------------------------------------------------------------


def with_statistics():
    """A base, and an attached copy of it whose running statistics training has moved."""
    base, selection = toy()
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    train(model).train()
    model(data()[0][0])
    return base.eval(), selection, model.eval()


def test_running_statistics_are_part_of_the_delta(tmp_path):
    base, selection, model = with_statistics()
    before = frozen_copy(base)
    delta = save_delta(model, tmp_path / "d")
    assert delta.keys() >= STATISTICS
    x = data()[0][0]
    with torch.no_grad(), Delta.load(tmp_path / "d").applied(base):
        assert torch.equal(base(x), model(x))
    assert_same(base, before)
    again = copy.deepcopy(base)
    gradsel.attach(again, selection)
    load_delta(again, tmp_path / "d")
    assert_same(again, model.state_dict())
    load_delta(model, tmp_path / "d")  # its own, although its statistics are no longer those of the base
    assert_same(model, again.state_dict())
    assert Delta.of(again) == delta


def test_a_delta_without_statistics_takes_those_of_the_base_back():
    base, _, model = with_statistics()
    delta = Delta({name: part for name, part in Delta.of(model).items() if name not in STATISTICS})
    load_delta(model, delta)
    for name in STATISTICS:
        assert same_bits(model.state_dict()[name], base.state_dict()[name])


@pytest.mark.parametrize("copied", [False, True])
def test_detach_restores_running_statistics(copied):
    base, _, model = with_statistics()
    model = copy.deepcopy(model) if copied else model
    delta = Delta.of(model)
    kept = gradsel.detach(copy.deepcopy(model))
    assert not same_bits(kept.bn.running_mean, base.bn.running_mean)
    gradsel.detach(model, restore=True)
    assert_same(model, base.state_dict())
    delta.apply_(model)  # the delta of the model fits it after it was restored
    assert_same(model, kept.state_dict())


def test_statistics_of_a_plain_checkpoint_are_the_new_base():
    base, selection = toy()
    gradsel.attach(base, selection)
    other = Toy()
    other.bn.running_mean += 5
    with pytest.warns(UserWarning, match="counts as one of the plain model"):
        base.load_state_dict(other.state_dict(), strict=False)
    assert not STATISTICS & Delta.of(base).keys()
    base.bn.running_mean += 1
    assert Delta.of(base).keys() & STATISTICS == {"bn.running_mean"}
    gradsel.detach(base, restore=True)
    assert same_bits(base.bn.running_mean, other.bn.running_mean)


def test_buffers_outside_checkpoints_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    gradsel.attach(model, random_selection(model))
    model.cache += 1
    assert "cache" not in Delta.of(model)
    gradsel.detach(model, restore=True)
    assert model.cache.tolist() == [1, 1, 1]


# --- Heads -------------------------------------------------------------------------------------------------------


def test_tensors_that_are_set_whole_may_be_any_in_the_base(tmp_path):
    base, selection, model = trained()
    delta = save_delta(model, tmp_path / "d")
    fresh = copy.deepcopy(base)
    nn.init.normal_(fresh.head.weight)
    before = frozen_copy(fresh)
    delta.check(fresh)
    with delta.applied(fresh):
        assert_same(fresh, {name: model.state_dict()[name] for name in before})
    assert_same(fresh, before)
    gradsel.attach(fresh, selection)
    load_delta(fresh, tmp_path / "d")
    assert same_bits(fresh.head.weight, model.head.weight)
    assert same_bits(gradsel.detach(fresh, restore=True).head.weight, before["head.weight"])


def test_almost_all_of_a_tensor_is_all_of_it():
    """A head that was trained in full has entries that happen to be the same; it must fit on every head."""
    base, tuned = nn.Linear(100, 10), nn.Linear(100, 10)
    with torch.no_grad():
        tuned.weight[0, :90] = base.weight[0, :90]
        tuned.bias.copy_(base.bias)
        tuned.bias[0] += 1
    delta = Delta.of(tuned, base=base)
    assert delta["weight"].mask.is_whole
    assert delta["bias"].mask.nnz == 1
    with delta.applied(base):
        assert_same(base, tuned.state_dict())


# --- Tied tensors ------------------------------------------------------------------------------------------------


def tied():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_two_names_of_a_tied_tensor_must_agree(shift, tmp_path):
    model = tied()
    before = frozen_copy(model)
    parts = {}
    for name, value in (("0.weight", 1.0), ("1.weight", 1.0 + shift)):
        tuned = nn.Module()
        tuned.x = nn.Parameter(before[name].clone())
        tuned.x.data[3] += value
        parts[name] = Delta.of(tuned, base={"x": before[name]})["x"]
    Delta(parts).save(tmp_path / "d")
    if shift:
        for use in (load_delta, lambda model, path: gradsel.TaskBank(model).add("a", path)):
            with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one tensor .* 4 of its entries"):
                use(model, tmp_path / "d")
        with pytest.raises(ValueError, match="one tensor"):
            load_delta(model, tmp_path / "d", force=True)
    else:
        with Delta.load(tmp_path / "d").applied(model):
            assert same_bits(model[1].weight[3], before["0.weight"][3] + 1)
    assert_same(model, before)


def test_names_of_a_tied_tensor_may_set_entries_of_their_own():
    model = tied()
    before = frozen_copy(model)
    parts = {}
    for name, row in (("0.weight", 1), ("1.weight", 2)):
        tuned = copy.deepcopy(before)
        tuned[name][row] = 7
        parts[name] = Delta.of(holder(tuned[name]), base={"x": before[name]})["x"]
    with Delta(parts).applied(model):
        assert model[0].weight[1:3].tolist() == [[7.0] * 4] * 2
    assert_same(model, before)


def holder(tensor):
    model = nn.Module()
    model.x = nn.Parameter(tensor, requires_grad=False)
    return model


# --- Dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.uint16], ids=str)
def test_dtypes_that_no_delta_holds_are_refused_when_it_is_made(dtype, tmp_path):
    base = {"x": torch.zeros(8).to(dtype), "y": torch.zeros(8)}
    tuned = {"x": torch.ones(8).to(dtype), "y": torch.ones(8)}

    def model(tensors):
        made = nn.Module()
        for name, tensor in tensors.items():
            made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return made

    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"x is {name}, and deltas hold float64, .* cast"):
        Delta.of(model(tuned), base=base)
    selection = gradsel.Selection({"x": Whole((8,)), "y": Whole((8,))})
    with pytest.raises(ValueError, match=f"x is {name}"):
        Delta.of(model(tuned), selection=selection)
    with pytest.raises(ValueError, match=f"x is {name}"):
        Delta({"x": Part(Whole((8,)), tuned["x"], dtype)}).save(tmp_path / "d", force=True)
    assert not (tmp_path / "d").exists()
    assert Delta.of(model({**tuned, "x": base["x"]}), base=base).keys() == {
        "y"
    }  # where it stays, it may have any dtype


def test_values_cannot_be_rounded_to_what_no_delta_holds():
    _, _, model = trained()
    for dtype, message in ((torch.float8_e5m2, "float8_e5m2"), (torch.int8, r"floating-point .*torch\.int8")):
        with pytest.raises(ValueError, match=message):
            Delta.of(model, dtype=dtype)
