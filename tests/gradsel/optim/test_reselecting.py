"""States converted: from dense to masked training and back, and from one selection to another."""

from __future__ import annotations

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Frozen, PerRow
from tests.gradsel.optim.cases import (
    MASKS,
    assert_frozen,
    frozen_bits,
    masked,
    random_masks,
    selection_for,
    train,
    trained,
    wide_grads,
)
from tests.kernels.cases import same_bits
from tests.support.toy import Toy, batches


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("attached", [False, True])
def test_a_dense_run_goes_on_as_a_masked_one(cls, attached):
    """On the selected entries, ours and torch's run with masked gradients agree bit for bit from there on."""
    torch.manual_seed(1)
    twin, data = Toy().eval(), batches(8)
    theirs = cls(twin.named_parameters(), foreach=False, fused=False, amsgrad=True)
    for batch in data[:4]:
        wide_grads(twin, batch)
        theirs.step()
    model = copy.deepcopy(twin)
    selection = selection_for(model, k=2)
    bits = frozen_bits(model, selection)
    masks = {name: mask.to_dense() for name, mask in selection.items()}
    kind = gradsel.MaskedAdam if cls is torch.optim.Adam else gradsel.MaskedAdamW
    if attached:
        gradsel.attach(model, selection)
        own = {name.removesuffix("_values"): p for name, p in model.named_parameters() if p.requires_grad}
        named = dict(model.named_parameters())
        order = [(name, own.get(name, named[name])) for name, _ in twin.named_parameters()]
        ours = kind(order[::-1])  # parameters are matched by name
    else:
        ours = kind(model.named_parameters(), masks=selection)
    ours.load_state_dict(theirs.state_dict())
    with gk.use_backend("reference"):
        for batch in data[4:]:
            wide_grads(twin, batch, selection)
            parameters = ours.param_groups[0]["params"]
            for p, q in zip(parameters[::-1] if attached else parameters, twin.named_parameters(), strict=True):
                owner = gradsel.attached.owner_of(p)
                grad = q[1].grad
                if grad is not None and p.requires_grad:
                    p.grad = grad.clone() if owner is None else owner[1].mask.gather(grad)
            theirs.step()
            ours.step()
    weights = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        assert torch.equal(weights[name].detach()[masks[name]], p.detach()[masks[name]]), name
        assert same_bits(weights[name].detach()[~masks[name]], bits[name]), name
    assert gradsel.state_bytes(ours) < gradsel.state_bytes(theirs) / 2


@pytest.mark.parametrize("kind", ["drop-in", "attached"])
def test_a_masked_run_goes_on_as_a_dense_one(kind):
    """Its moments are padded with zeros; torch's Adam then moves the selected entries as we would."""
    model = Toy().eval()
    selection = selection_for(model, k=2)
    if kind == "attached":
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), amsgrad=True)
    else:
        optimizer = masked(model, selection, amsgrad=True)
    train(model, optimizer, 3)
    state = optimizer.dense_state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    routes = [(p, gradsel.attached.owner_of(p)) for p in optimizer.param_groups[0]["params"]]
    weights = [nn.Parameter((p if owner is None else owner[0]).detach().clone()) for p, owner in routes]
    dense = torch.optim.Adam(weights, foreach=False, fused=False)
    dense.load_state_dict(torch.load(file, weights_only=True))
    names = {p: name for name, p in model.named_parameters()}
    for (p, _), weight in zip(routes, weights, strict=True):
        mask = selection[names[p].removesuffix("_values")]
        assert (weight in dense.state) == (p in optimizer.state)
        if p not in optimizer.state:
            continue
        assert dense.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(mask.gather(dense.state[weight][name]), optimizer.state[p][name])
            assert not dense.state[weight][name][~mask.to_dense()].any()
            assert dense.state[weight][name].data_ptr() != optimizer.state[p][name].data_ptr()
        p.grad = torch.ones_like(p)
        weight.grad = mask.to_dense().float()
    with gk.use_backend("reference"):
        optimizer.step()
        dense.step()
    for (p, owner), weight in zip(routes, weights, strict=True):
        assert torch.equal(p if owner is None else owner[0], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reselection_keeps_the_state_of_entries_that_stay(backend, dtype):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(9, 6), nn.Conv2d(2, 4, 3), nn.Linear(5, 3)).to(dtype)
    selections = [random_masks(model, 0, 3), random_masks(model, 1, 4)]
    frozen = {"2.weight": Frozen((3, 5)), "0.bias": Frozen((6,))}
    selections = [selections[0], gradsel.Selection({**selections[1], **frozen}), selections[0]]
    optimizer = masked(model, selections[0], lr=0.01, amsgrad=True, anchor=0.1)
    names = {p: name for name, p in model.named_parameters()}

    def steps(count):
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    steps(3)
    for old, new in pairwise(selections):
        before = copy.deepcopy({names[p]: state for p, state in optimizer.state.items()})
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.reselect(new)
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name])
            if name not in before or not new[name].nnz:
                assert p not in optimizer.state
                continue
            state, both = optimizer.state[p], old[name].to_dense() & new[name].to_dense()
            assert both.any()
            assert state["step"] == before[name]["step"]
            for key in before[name].keys() - {"step", "mask_fingerprint"}:
                start = torch.zeros(p.shape) if "exp_avg" in key else weights[name].float()
                was, now = start.clone(), start.clone()
                old[name].scatter_(was, before[name][key])
                new[name].scatter_(now, state[key])
                assert same_bits(now[both], was[both])
                assert same_bits(now[~both], start[~both])
        bits = frozen_bits(model, new)
        steps(2)
        assert_frozen(model, new, bits)
        steps(1)
    fresh = masked(model, selections[-1], amsgrad=True)
    fresh.load_state_dict(optimizer.state_dict())


def test_reselection_of_a_dense_run_and_what_it_refuses():
    model = nn.Sequential(nn.Linear(9, 4))
    optimizer = gradsel.MaskedAdam(model.named_parameters())
    model(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    with pytest.raises(KeyError, match=r"'0\.bias'"):
        optimizer.reselect({"0.weight": PerRow(torch.zeros(4, 1, dtype=torch.int32), (4, 9))})
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moments)
    optimizer.reselect(random_masks(model, 0))
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (4, 2)
    gradsel.attach(model, random_masks(model, 0))
    with pytest.raises(ValueError, match="attached"):
        gradsel.MaskedAdam(gradsel.trainable_parameters(model)).reselect(random_masks(model, 0))
    with pytest.raises(ValueError, match="names"):
        gradsel.MaskedAdam([nn.Parameter(torch.ones(2, 3))]).reselect(MASKS)


def test_attached_models_are_reselected_through_the_dense_state():
    """As docs/optimizer.md describes: dense_state_dict, detach, attach, a new optimizer, load_state_dict."""
    model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
    first, second = random_masks(model, 0, 3), random_masks(model, 1, 3)
    gradsel.attach(model, first)
    optimizer = gradsel.MaskedAdam(trained(model))
    model(torch.ones(2, 9)).square().sum().backward()
    optimizer.step()
    state = optimizer.dense_state_dict()
    gradsel.detach(model)
    gradsel.attach(model, second)
    optimizer = gradsel.MaskedAdam(trained(model))
    optimizer.load_state_dict(state)
    numbers = {name: number for number, name in enumerate(state["param_groups"][0]["param_names"])}
    for name, p in trained(model):
        owner = gradsel.attached.owner_of(p)
        moments = state["state"][numbers[name.removesuffix("_values")]]["exp_avg"]
        assert torch.equal(optimizer.state[p]["exp_avg"], moments if owner is None else owner[1].mask.gather(moments))
        assert optimizer.state[p]["step"] == 1
    both = first["0.weight"].to_dense() & second["0.weight"].to_dense()
    assert (state["state"][numbers["0.weight"]]["exp_avg"] != 0)[both].any()


def test_reselecting_leaves_groups_with_masks_of_their_own_and_failures_change_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 3))
    masks = random_masks(model, 0, 3)
    head = {"params": list(model[1].named_parameters("1")), "masks": None}
    optimizer = gradsel.MaskedAdam([{"params": list(model[0].named_parameters("0"))}, head], masks=masks)
    model(torch.ones(2, 9)).square().sum().backward()
    optimizer.step()
    before = {p: dict(state) for p, state in optimizer.state.items()}
    with monkeypatch.context() as patch:
        patch.setattr("gradsel.optim.reselecting.migrated", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.reselect(random_masks(model, 1, 3))
    assert {p: dict(state) for p, state in optimizer.state.items()}.keys() == before.keys()
    assert all(optimizer.state[p][key] is value for p, state in before.items() for key, value in state.items())
    optimizer.reselect(gradsel.Selection({name: m for name, m in random_masks(model, 1, 3).items() if name[0] == "0"}))
    assert optimizer.state[model[1].weight]["exp_avg"].shape == model[1].weight.shape
    attached = nn.Linear(4, 4)
    gradsel.attach(attached, gradsel.select(attached, None, None, criterion="random"))
    with pytest.raises(ValueError, match=r"attached.*detach"):
        gradsel.MaskedAdam(gradsel.trainable_parameters(attached)).reselect(None)
