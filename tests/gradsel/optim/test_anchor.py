"""MaskedAdam with an anchor: where it pulls the weights, and what it remembers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsel
from tests.gradsel.optim.cases import RETURN, selection_for, train
from tests.kernels.cases import same_bits
from tests.support.toy import Toy, batches, cross_entropy


@pytest.mark.parametrize("options", [{"anchor": 0.125}, {"anchor": 0.1, "anchor_norm": 1}], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_with_an_anchor_it_is_adam_on_the_regularised_loss(backend, options, maximize):
    """Bit for bit: products with a power of two or a sign are exact, so autograd rounds once, as we do."""
    model = Toy().eval()
    selection = selection_for(model, 2)
    masks = {name: mask.to_dense() for name, mask in selection.items()}
    ours = gradsel.MaskedAdam(model.named_parameters(), masks=selection, maximize=maximize, **options)
    originals = {name: p.detach()[masks[name]].clone() for name, p in model.named_parameters()}
    twins = {name: nn.Parameter(original.clone()) for name, original in originals.items()}
    theirs = torch.optim.Adam(twins.values(), maximize=maximize, foreach=False, fused=False)
    for batch in batches(8):
        ours.zero_grad()
        theirs.zero_grad()
        cross_entropy(model, batch).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                gap = twins[name] - originals[name]
                pull = options["anchor"] * (gap.abs() if "anchor_norm" in options else gap**2).sum()
                ((p.grad[masks[name]] * twins[name]).sum() + (-pull if maximize else pull)).backward()
        ours.step()
        theirs.step()
        for name, p in model.named_parameters():
            got = p.detach()[masks[name]]
            if backend == "reference":
                assert torch.equal(got, twins[name]), name
            else:
                torch.testing.assert_close(got, twins[name].detach(), rtol=1e-6, atol=1e-7)
            twins[name].data.copy_(got)


def return_to_originals(model, optimizer):
    for group in optimizer.param_groups:
        group.update(RETURN)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_originals_are_the_weights_of_the_first_step_with_an_anchor(backend, dtype):
    model, pretrained = Toy().to(dtype), Toy().to(dtype).state_dict()
    selection = gradsel.select(model, None, None, criterion="random")
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, lr=0.01, anchor=0.1)
    model.load_state_dict(pretrained)  # after the optimizer was made
    data = [(x.to(dtype), y) for x, y in batches(4)]
    for batch in data:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    for p in optimizer.state:
        assert optimizer.state[p]["original"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert not torch.equal(model.head.weight, pretrained["head.weight"])
    return_to_originals(model, optimizer)
    for name, p in model.named_parameters():
        assert not selection[name].nnz or same_bits(p.detach(), pretrained[name]), name


def test_an_anchor_that_comes_later_holds_the_weights_of_then():
    model = Toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection_for(model), lr=0.01)
    train(model, optimizer, 2)
    assert all("original" not in state for state in optimizer.state.values())
    then = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["anchor"] = 0.1
    train(model, optimizer, 2)
    optimizer.param_groups[0]["anchor"] = 0.0
    train(model, optimizer, 2)
    return_to_originals(model, optimizer)
    for p, name in ((model.head.weight, "head.weight"), (model.head.bias, "head.bias")):
        assert same_bits(p.detach(), then[name])


@pytest.mark.parametrize("duplicate", [lambda x: x, copy.deepcopy], ids=["itself", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attached_models_are_anchored_to_what_they_were_at_attach(backend, dtype, duplicate):
    """Even if the anchor is set later; what detach() restores does not change."""
    model = Toy().to(dtype).eval()
    selection = gradsel.select(model, None, None, criterion="random")
    pretrained = copy.deepcopy(model.state_dict())
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.01)
    wholes = [p for p in optimizer.param_groups[0]["params"] if gradsel.attached.owner_of(p) is None]

    def steps():
        for x, y in batches(3):
            optimizer.zero_grad()
            cross_entropy(model, (x.to(dtype), y)).backward()
            optimizer.step()

    steps()
    with torch.no_grad():
        for p in wholes:  # whole parameters are anchored to their values at the first step with an anchor
            p.copy_(next(pretrained[name] for name, q in model.named_parameters() if q is p))
    for group in optimizer.param_groups:
        group.update(anchor=0.1, anchor_norm=1)
    steps()
    model, optimizer = duplicate((model, optimizer))
    steps()
    trained = {name for name, p in model.named_parameters() if name in pretrained and selection[name].nnz}
    own = model.state_dict()
    assert sum(not torch.equal(own[name], pretrained[name]) for name in trained) > len(trained) // 2
    return_to_originals(model, optimizer)
    for name, value in model.state_dict().items():
        assert name not in pretrained or same_bits(value, pretrained[name]), name
    gradsel.detach(model, restore=True)
    for name, value in model.state_dict().items():
        assert same_bits(value, pretrained[name]), name


def test_a_resumed_run_keeps_its_anchor_where_the_model_is_attached_as_trained(backend):
    plain, data = Toy().eval(), batches(6)
    selection = gradsel.select(plain, None, None, criterion="random")

    def attached(model):
        gradsel.attach(model, selection)
        return model, gradsel.MaskedAdam(gradsel.trainable_parameters(model), anchor=0.1)

    def steps(model, optimizer, part):
        for batch in part:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()

    model, optimizer = attached(copy.deepcopy(plain))
    steps(model, optimizer, data[:3])
    trained = {name: p for name, p in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(trained)
    resumed, second = attached(plain)
    second.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, data[3:])
    steps(resumed, second, data[3:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())


def test_the_stronger_the_anchor_the_nearer_the_weights_stay():
    """Parameter groups have their own anchors: here, heads and biases have none."""
    start = Toy().eval()
    selection = gradsel.select(start, None, None, criterion="random")

    def distance(anchor):
        model = copy.deepcopy(start)
        gradsel.attach(model, selection)
        parameters = gradsel.trainable_parameters(model)
        held = [p for p in parameters if gradsel.attached.owner_of(p) is not None]
        groups = [{"params": held, "anchor": anchor}, {"params": [p for p in parameters if p not in set(held)]}]
        optimizer = gradsel.MaskedAdamW(groups, lr=0.01, weight_decay=0.0, anchor_decoupled=True)
        train(model, optimizer, 20)
        kept = [p for p, state in optimizer.state.items() if "original" in state]
        assert set(kept) == ({p for p in held if p.grad is not None} if anchor else set())
        return sum((p - gradsel.attached.owner_of(p)[1].entries).square().sum().item() for p in held)

    assert distance(0.0) > distance(5.0) > distance(40.0) > 0


def test_state_of_a_run_that_knew_no_anchor_leaves_it_as_it_is():
    model = Toy()
    dense = torch.optim.Adam(model.parameters())
    train(model, dense, 1)
    optimizer = gradsel.MaskedAdam(model.parameters(), anchor=0.1, anchor_decoupled=True, anchor_norm=1)
    assert "anchor" not in dense.param_groups[0]
    optimizer.load_state_dict(dense.state_dict())
    options = optimizer.param_groups[0]
    assert (options["anchor"], options["anchor_decoupled"], options["anchor_norm"]) == (0.1, True, 1)
    train(model, optimizer, 1)
    assert all("original" in state for state in optimizer.state.values())


def test_a_bad_anchor_in_the_middle_and_rounded_moments():
    weight = nn.Parameter(torch.zeros(6))
    optimizer = gradsel.MaskedAdam([weight], 1e-3, anchor=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.param_groups[0]["anchor"] = -50.0
    with pytest.raises(ValueError, match=r"anchor.*-50\.0"):
        optimizer.step()
    with pytest.warns(UserWarning, match=r"beta2 = 0\.999"):
        rounded = gradsel.MaskedAdam([weight], state_dtype=torch.bfloat16)
    rounded.step()
    assert rounded.dense_state_dict()["state"][0]["exp_avg"].dtype is torch.float32
