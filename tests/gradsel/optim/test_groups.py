"""Parameter groups: options and masks of their own, schedulers, and names inside wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Frozen, PerRow, Whole
from tests.gradsel.optim.cases import assert_frozen, frozen_bits, random_masks, selection_for, train
from tests.support.toy import Toy


def test_parameter_groups_and_schedulers():
    model, twin = Toy().eval(), None
    twin = copy.deepcopy(model)

    def groups(net):
        named = dict(net.named_parameters())
        head = [(n, p) for n, p in named.items() if n.startswith("head")]
        rest = [(n, p) for n, p in named.items() if not n.startswith("head")]
        return [{"params": rest}, {"params": head, "lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}]

    ours = gradsel.MaskedAdam(groups(model), lr=0.01)
    theirs = torch.optim.Adam(groups(twin), lr=0.01, foreach=False, fused=False)
    with gk.use_backend("reference"):
        train(model, ours, 6, lr_scheduler.CosineAnnealingLR(ours, 6))
        train(twin, theirs, 6, lr_scheduler.CosineAnnealingLR(theirs, 6))
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_add_param_group():
    model = Toy()
    selection = selection_for(model)
    named = list(model.named_parameters())
    optimizer = gradsel.MaskedAdam(named[:4], masks=selection)
    optimizer.add_param_group({"params": named[4:], "lr": 0.1})
    bits = frozen_bits(model, selection)
    train(model, optimizer)
    assert_frozen(model, selection, bits)
    with pytest.raises(KeyError, match="'stranger'"):
        optimizer.add_param_group({"params": [("stranger", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 2


def test_a_parameter_put_into_a_group_by_hand():
    old, new = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    new.grad = torch.ones(3)
    optimizer = gradsel.MaskedAdam([old])
    optimizer.param_groups[0]["params"][0] = new
    optimizer.step()
    assert (new != 0).all()
    masked = gradsel.MaskedAdam([("old", old)], masks={"old": Whole((3,))})
    masked.param_groups[0]["params"][0] = new
    with pytest.raises(KeyError, match="group by hand"):
        masked.step()


def test_groups_have_masks_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4))
    all_masks = random_masks(model, 0)
    own = {"1.weight": PerRow(torch.full((4, 1), 5, dtype=torch.int32), (4, 6)), "1.bias": Frozen((4,))}
    groups = [{"params": list(layer.named_parameters(prefix=str(i)))} for i, layer in enumerate(model)]
    groups[1]["masks"], groups[2]["masks"] = own, None
    optimizer = gradsel.MaskedAdam(groups, masks=all_masks)
    assert groups[1]["masks"] is own  # the caller's dict can be used again
    assert all("masks" not in group for group in optimizer.param_groups)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    changed = [
        [p != q for p, q in zip(layer.parameters(), old.parameters(), strict=True)]
        for layer, old in zip(model, before, strict=True)
    ]
    assert torch.equal(changed[0][0], all_masks["0.weight"].to_dense())
    assert torch.equal(changed[1][0], own["1.weight"].to_dense())
    assert not changed[1][1].any()
    assert all(c.all() for c in (changed[0][1], *changed[2]))
    with pytest.raises(TypeError, match=r"masks .*Selection"):
        gradsel.MaskedAdam([{"params": list(model.named_parameters()), "masks": [1]}])


@pytest.mark.parametrize("how", ["masks", "policy"])
def test_the_selection_has_the_masks_of_all_groups(how, tmp_path):
    """Deltas are made of it, and models attached to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3))
    base, selected = copy.deepcopy(model), random_masks(model, 0)
    own = {"1.weight": PerRow(torch.full((5, 1), 3, dtype=torch.int32), (5, 4)), "1.bias": Frozen((5,))}
    groups = [{"params": list(layer.named_parameters(prefix=str(i)))} for i, layer in enumerate(model)]
    groups[1]["masks"], groups[2]["masks"] = own, None
    options = {"masks": selected} if how == "masks" else {"policy": gradsel.PerNeuron(2), "model": model}
    optimizer = gradsel.MaskedAdamW(groups, lr=1e-2, **options)

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
            optimizer.step()

    train(model, optimizer, 2)
    found = {name: mask.to_dense() for name, mask in optimizer.selection.items()}
    for (name, parameter), before in zip(model.named_parameters(), base.parameters(), strict=True):
        assert not (parameter != before)[~found[name]].any(), name
    assert found["2.weight"].all()
    assert torch.equal(found["1.weight"], own["1.weight"].to_dense())
    assert found["0.weight"].sum() == 8
    optimizer.load_state_dict(optimizer.state_dict())
    gradsel.save_delta(model, tmp_path / "delta", selection=optimizer.selection, base=base)
    tuned = copy.deepcopy(base)
    gradsel.load_delta(tuned, tmp_path / "delta")
    assert all(map(torch.equal, model.state_dict().values(), tuned.state_dict().values()))
    twin, (other,) = copy.deepcopy((model, [optimizer]))
    optimizer.attach(model)
    assert {name: mask.to_dense().tolist() for name, mask in optimizer.selection.items()} == {
        name: mask.tolist() for name, mask in found.items()
    }
    train(model, optimizer, 3)
    train(twin, other, 3)
    gradsel.detach(model)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)


def test_names_with_wrapper_prefixes():
    model = Toy()
    selection = selection_for(model)
    named = [(f"_orig_mod.module.{name}", p) for name, p in model.named_parameters()]
    bits = frozen_bits(model, selection)
    train(model, gradsel.MaskedAdam(named, masks=selection))
    assert_frozen(model, selection, bits)
