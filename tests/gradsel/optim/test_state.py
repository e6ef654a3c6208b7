"""The state of MaskedAdam: saved, loaded, matched to its masks and parameters."""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gradsel
from gradsel.masks import Flat, PerRow, Whole, WholeColumns, WholeRows, from_parts
from gradsel.optim.state import fingerprint
from gradsel.views import NeuronView
from tests.gradsel.optim.cases import (
    ANCHORS,
    assert_frozen,
    frozen_bits,
    masked,
    one_parameter,
    random_masks,
    selection_for,
    train,
    trained,
)
from tests.kernels.cases import same_bits
from tests.support.toy import Toy, batches, cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}, *ANCHORS], ids=str)
def test_resuming_is_bit_equal_to_not_having_stopped(backend, options, dtype):
    data = [(x.to(dtype), y) for x, y in batches(6)]

    def steps(model, optimizer, part):
        for batch in part:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()

    model = Toy().to(dtype).eval()
    selection = gradsel.select(model, None, None, criterion="random")
    resumed = copy.deepcopy(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)
    steps(model, optimizer, data[:3])

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    second = gradsel.MaskedAdam(resumed.named_parameters(), masks=selection, **options)
    second.load_state_dict(checkpoint["optimizer"])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert second.state[q].keys() == optimizer.state[p].keys()
        for key, value in optimizer.state[p].items():
            if key == "mask_fingerprint":
                assert second.state[q][key] == value
            else:
                assert same_bits(second.state[q][key], value)
                assert second.state[q][key].data_ptr() != value.data_ptr()

    steps(model, optimizer, data[3:])
    steps(resumed, second, data[3:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert same_bits(p, q)


def test_loaded_state_does_not_alias_its_source():
    model = Toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection_for(model))
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    other = gradsel.MaskedAdam(model.named_parameters(), masks=optimizer._selection)
    other.load_state_dict(state)
    before = copy.deepcopy(state["state"])
    train(model, other, 2)
    for key, entries in before.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(state["state"][key][name]), torch.as_tensor(value))


def test_an_optimizer_of_an_older_version_can_be_copied_and_extended():
    old = gradsel.MaskedAdam(one_parameter())
    for options in (old.defaults, *old.param_groups):
        for name in [name for name in options if name.startswith("anchor")]:
            del options[name]
    new = copy.deepcopy(old)
    new.add_param_group({"params": one_parameter()})
    assert [group["anchor"] for group in new.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("cls", [nn.Linear, lambda n, m: nn.Conv2d(n, m, 1)], ids=["linear", "conv"])
def test_state_of_another_selection_is_refused(cls):
    """Even where the shapes agree; the error names the parameter, and nothing changes."""
    model = nn.Sequential(cls(9, 4))
    masks, others = random_masks(model, 0), random_masks(model, 1)
    optimizer = masked(model, masks)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    masked(model, masks).load_state_dict(state)
    second = masked(model, others)
    with pytest.raises(ValueError, match=r"selection of 0\.weight"):
        second.load_state_dict(state)
    assert not second.state
    unnamed = gradsel.MaskedAdam(model.parameters())
    with pytest.raises(ValueError, match="selection of parameter 0"):
        unnamed.load_state_dict(state)
    torch.optim.Adam(model.parameters()).load_state_dict(state)  # torch's Adam does not check shapes


def test_state_of_another_selection_is_refused_where_the_model_is_attached():
    plain = nn.Sequential(nn.Linear(9, 4))
    states = []
    for seed in (0, 1):
        model = copy.deepcopy(plain)
        gradsel.attach(model, random_masks(model, seed))
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model))
        model(torch.ones(2, 9)).sum().backward()
        optimizer.step()
        states.append(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"selection of 0\.weight"):
        optimizer.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])


def test_fingerprints_tell_masks_apart():
    """Kind, view and shape count too, as they determine the order of the moments. Copies and files change nothing."""
    cols = torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32)
    masks = [
        PerRow(cols, (3, 3)),
        PerRow(cols, (3, 3), NeuronView((1,))),
        PerRow(cols, (3, 1, 3)),
        PerRow(cols.flip(0), (3, 3)),
        Flat(torch.tensor([0, 1, 4, 5, 6, 8]), (3, 3)),
        WholeRows(torch.tensor([0, 1], dtype=torch.int32), (3, 3)),
        WholeRows(torch.tensor([0, 2], dtype=torch.int32), (3, 3)),
        WholeColumns(torch.tensor([0, 2], dtype=torch.int32), (3, 3)),
    ]
    prints = [fingerprint(mask) for mask in masks]
    assert len(set(prints)) == len(masks)
    assert all(0 <= number < 2**63 for number in prints)
    assert [fingerprint(copy.deepcopy(mask)) for mask in masks] == prints
    read = [from_parts(mask.kind, mask.shape, mask.describe(), mask.packed()) for mask in masks]
    assert [fingerprint(mask) for mask in read] == prints


def test_a_state_without_fingerprints_is_taken_where_shapes_agree():
    """As the previous version saved it; a different number of entries is still refused."""
    model = nn.Sequential(nn.Linear(9, 4))
    optimizer = masked(model, random_masks(model, 0))
    model(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["mask_fingerprint"]
    optimizer.load_state_dict(state)
    assert "mask_fingerprint" in optimizer.state[model[0].weight]
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight .*4x2 .*4x3"):
        masked(model, random_masks(model, 0, k=3)).load_state_dict(state)


def test_states_find_their_parameters_by_name():
    """attach() registers values after biases, and all shapes here are equal, so order alone would mix them up."""
    model = nn.LayerNorm(6)
    whole = gradsel.Selection({"weight": Whole((6,)), "bias": Whole((6,))})
    part = gradsel.Selection({"weight": Flat(torch.tensor([0, 2, 5], dtype=torch.int32), (6,)), "bias": Whole((6,))})
    gradsel.attach(model, whole)
    optimizer = gradsel.MaskedAdam(trained(model))
    model.weight.grad, model.bias.grad = torch.full((6,), 2.0), torch.full((6,), 3.0)
    optimizer.step()
    state = optimizer.dense_state_dict()
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in trained(model)}
    gradsel.detach(model)
    gradsel.attach(model, part)
    assert [name for name, _ in trained(model)] == ["bias", "weight_values"]
    second = gradsel.MaskedAdam(trained(model))
    second.load_state_dict(state)
    assert torch.equal(second.state[model.bias]["exp_avg"], moments["bias"])
    assert torch.equal(second.state[model.weight_values]["exp_avg"], moments["weight"][[0, 2, 5]])
    assert second.param_groups[0]["param_names"] == ["bias", "weight_values"]
    with pytest.raises(ValueError, match=r"dense state .*name"):
        gradsel.MaskedAdam(gradsel.trainable_parameters(model)).load_state_dict(state)


def test_a_state_that_is_reset_begins_anew():
    weight = nn.Parameter(torch.zeros(6))
    optimizer = gradsel.MaskedAdam([weight], 1e-3)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state = collections.defaultdict(dict)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    optimizer.state[weight].clear()
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1


def test_options_of_ours_survive_a_state_of_torch_s_adam():
    model = Toy()
    dense = torch.optim.Adam(model.parameters())
    train(model, dense, 1)
    options = {"anchor": 0.3, "anchor_norm": 1, "anchor_decoupled": True, "low_precision": "kahan", "seed": 7}
    optimizer = gradsel.MaskedAdam(model.parameters(), **options)
    optimizer.load_state_dict(dense.state_dict())
    assert {name: optimizer.param_groups[0][name] for name in options} == options


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_their_masks(duplicate):
    model = Toy()
    selection = selection_for(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    train(model, optimizer, 2)
    model, optimizer = duplicate((model, optimizer))
    bits = frozen_bits(model, selection)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2)
    assert_frozen(model, selection, bits)
    assert not torch.equal(model.head.weight, before["head.weight"])
