"""Deltas taken out of models and put into others, to the bit, in every dtype and for every kind of mask."""

from __future__ import annotations

import copy

import pytest
import torch

import gradsel
from gradsel.delta.delta import Delta, load_delta, save_delta
from gradsel.delta.parts import same_bits
from tests.support.deltas import DTYPES, Odd, assert_same, frozen_copy, odd_selection, plain, train, trained
from tests.support.selections import KINDS, data, random_selection, toy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_applied_and_reverted_to_the_bit(kind, dtype, tmp_path):
    base, selection, model = trained(kind, dtype)
    before = frozen_copy(base)
    made = save_delta(model, tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    assert loaded == made
    assert loaded.trainable_count() == selection.trainable_count()
    for module in model.modules():
        for short, selected in vars(module).get("_gradsel_selected", {}).items():
            assert same_bits(loaded[selected.name].values, module._parameters[short + "_values"].detach())
    handle = load_delta(base, tmp_path / "d")
    assert_same(base, plain(model).state_dict())
    handle.revert_()
    assert_same(base, before)
    with loaded.applied(base):
        assert_same(base, plain(model).state_dict())
    assert_same(base, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_may_be_saved_narrower_and_are_rounded_once(dtype, tmp_path):
    base, _, model = trained()
    exact, rounded = save_delta(model, tmp_path / "exact"), save_delta(model, tmp_path / "rounded", dtype=dtype)
    loaded = Delta.load(tmp_path / "rounded")
    loaded.apply_(base)
    for name, part in exact.items():
        assert loaded[name].values.dtype is dtype
        assert same_bits(part.mask.gather(base.get_parameter(name).detach()), part.values.to(dtype).float()), name
    assert rounded == loaded
    assert (exact == loaded) == (dtype is torch.float32)


def test_any_view_and_memory_format(tmp_path):
    torch.manual_seed(0)
    base, selection = Odd(), odd_selection()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            selection[name].scatter_(parameter, selection[name].gather(parameter) + 1)
    made = save_delta(tuned, tmp_path / "d", selection=selection, base=base)
    loaded = Delta.load(tmp_path / "d")
    assert made == loaded
    assert loaded == Delta.of(tuned, selection=selection, base={n: p.contiguous() for n, p in base.named_parameters()})
    before = frozen_copy(base)
    strides = [p.stride() for p in base.parameters()]
    for model in (base, copy.deepcopy(base)):
        with loaded.applied(model):
            assert_same(model, tuned.state_dict())
        assert_same(model, before)
        assert [p.stride() for p in model.parameters()] == strides
    gradsel.attach(base, selection)
    with torch.no_grad():
        for p in gradsel.trainable_parameters(base):
            p.add_(1)
    gradsel.sync(base)
    assert Delta.of(base) == made
    assert [part.digest for part in Delta.of(base).values()] == [part.digest for part in made.values()]
    assert [part.fingerprint for part in Delta.of(base).values()] == [part.fingerprint for part in made.values()]


def test_a_plain_model_with_its_selection_and_base():
    base, selection, model = trained()
    attached, tuned = Delta.of(model), plain(model)
    by_both = Delta.of(tuned, selection=selection, base=base)
    by_state = Delta.of(tuned, selection=selection, base=base.state_dict())
    assert attached == by_both == by_state
    for name, part in attached.items():
        for other in (by_both[name], by_state[name]):
            assert (other.digest, other.fingerprint) == (part.digest, part.fingerprint), name
            assert same_bits(other.originals, part.originals)
    by_base = Delta.of(tuned, base=base)  # only the entries that changed
    assert 0 < by_base.trainable_count() <= attached.trainable_count()
    with by_base.applied(base):
        assert_same(base, tuned.state_dict())
    with pytest.raises(ValueError, match=r"selection .*base"):
        Delta.of(tuned)
    with torch.no_grad():
        tuned.pos_embed[0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"1 entr.* pos_embed .*not selected"):
        Delta.of(tuned, selection=selection, base=base)
    with pytest.raises(ValueError, match=r"head\.weight .*4x12 .*7x12"):
        Delta.of(plain(model), selection=selection, base={**base.state_dict(), "head.weight": torch.zeros(7, 12)})
    with pytest.raises(ValueError, match=r"pos_embed .*1x5x12 .*missing"):
        Delta.of(tuned, selection=selection, base={n: base.get_parameter(n) for n in ("cls_token",)})
    with pytest.raises(ValueError, match=r"base .*attached"):
        Delta.of(tuned, base=model)


def test_a_selection_alone_recognises_the_base_by_its_fingerprints():
    base, _ = toy()
    selection = gradsel.select(base, None, None, gradsel.PerNeuron(1), "random", progress=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            selection[name].scatter_(parameter, selection[name].gather(parameter) + 1)
    delta = Delta.of(tuned, selection=selection)
    assert not any(part.digest for part in delta.values())
    assert delta.notes == selection.notes
    with delta.applied(base):
        assert_same(base, tuned.state_dict())
    with pytest.raises(ValueError, match=r"patch_embed\.weight"):
        delta.apply_(tuned)
    unknown = Delta.of(tuned, selection=gradsel.Selection(selection))
    with pytest.raises(ValueError, match=r"base of patch_embed\.weight"):
        unknown.apply_(base)
    with pytest.raises(ValueError, match="know the base"):
        unknown.check(base)
    unknown.apply_(base, force=True)
    assert_same(base, tuned.state_dict())


def test_the_selection_saves_computing_fingerprints_of_an_attached_model():
    base, _ = toy()
    selection = gradsel.select(base, None, None, gradsel.PerNeuron(1), "random", freeze=["unused.*"], progress=False)
    gradsel.attach(base, selection)
    train(base)
    with_it, without = Delta.of(base, selection=selection), Delta.of(base)
    assert [part.fingerprint for part in with_it.values()] == [part.fingerprint for part in without.values()]
    assert with_it.notes["policy"] == selection.notes["policy"]
    assert Delta.of(base, selection=selection, notes={"task": "toys"}).notes["task"] == "toys"
    with pytest.raises(ValueError, match="not attached"):
        Delta.of(base, selection=random_selection(base_of(base)))


def base_of(attached):
    return gradsel.detach(copy.deepcopy(attached), restore=True)


def test_running_statistics_go_along_if_the_base_is_given():
    base, selection = toy()
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    train(model).train()
    model(data()[0][0])
    delta = Delta.of(model, base=base)
    assert {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"} <= delta.keys()
    before = frozen_copy(base)
    with delta.applied(base):
        assert_same(base, plain(model).state_dict())
    assert_same(base, before)
    again = copy.deepcopy(base)
    gradsel.attach(again, selection)
    load_delta(again, delta)
    assert_same(plain(again), plain(model).state_dict())
