"""MaskedAdam equals Adam on the selected entries; its options, and arguments it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsel
import gradsel_kernels as gk
from tests.gradsel.optim.cases import (
    ADAM_OPTIONS,
    MASKS,
    assert_frozen,
    frozen_bits,
    named_parameter,
    one_parameter,
    selection_for,
)
from tests.support.toy import Toy, batches, cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_without_masks_it_is_adam(options, dtype):
    model = Toy().to(dtype).eval()
    twin = copy.deepcopy(model)
    ours = gradsel.MaskedAdam(model.parameters(), **options)
    theirs = torch.optim.Adam(twin.parameters(), foreach=False, fused=False, **options)
    with gk.use_backend("reference"):
        for batch in [(x.to(dtype), y) for x, y in batches(6)]:
            for net, optimizer in ((model, ours), (twin, theirs)):
                optimizer.zero_grad()
                cross_entropy(net, batch).backward()
                optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_with_masks_it_is_adam_on_the_selected_entries(backend, options):
    """The twin trains dense copies of the selected entries with torch's Adam, from the same gradients."""
    model = Toy().eval()
    selection = selection_for(model, k=2)
    masks = {name: selection[name].to_dense() for name, _ in model.named_parameters()}
    bits = frozen_bits(model, selection)
    twins = {name: nn.Parameter(p.detach()[masks[name]].clone()) for name, p in model.named_parameters()}
    ours = gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)
    theirs = torch.optim.Adam(twins.values(), foreach=False, fused=False, **options)
    for batch in batches(8):
        ours.zero_grad()
        cross_entropy(model, batch).backward()
        for name, p in model.named_parameters():
            twins[name].grad = None if p.grad is None else p.grad[masks[name]].clone()
        ours.step()
        theirs.step()
        for name, p in model.named_parameters():
            got = p.detach()[masks[name]]
            if backend == "reference":
                assert torch.equal(got, twins[name]), name
            else:
                torch.testing.assert_close(got, twins[name].detach(), rtol=1e-6, atol=1e-7)
            twins[name].data.copy_(got)  # the next gradients come from the same weights
    assert_frozen(model, selection, bits)


def test_closure_and_hooks():
    model = Toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection_for(model))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model, batches()[0])
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls == ["pre", "post"]


def test_adamw_defaults():
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    ours, theirs = gradsel.MaskedAdamW(model.parameters()), torch.optim.AdamW(twin.parameters(), foreach=False)
    for net, optimizer in ((model, ours), (twin, theirs)):
        net(torch.ones(1, 3)).sum().backward()
        with gk.use_backend("reference"):
            optimizer.step()
    assert ours.defaults["weight_decay"] == 0.01
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gradsel.MaskedAdam(one_parameter(), lr=-1), ValueError, "learning rate.*-1"),
        (lambda: gradsel.MaskedAdam(one_parameter(), eps=-1), ValueError, "epsilon.*-1"),
        (lambda: gradsel.MaskedAdam(one_parameter(), betas=(1.0, 0.9)), ValueError, r"beta.*index 0.*1\.0"),
        (lambda: gradsel.MaskedAdam(one_parameter(), weight_decay=-1), ValueError, "weight_decay.*-1"),
        (lambda: gradsel.MaskedAdam(one_parameter(), anchor=-1), ValueError, "anchor.*-1"),
        (lambda: gradsel.MaskedAdam([{"params": one_parameter(), "anchor": -1}]), ValueError, "anchor.*-1"),
        (lambda: gradsel.MaskedAdamW(one_parameter(), anchor_norm=3), ValueError, "anchor_norm.*3"),
        (lambda: gradsel.MaskedAdam(one_parameter(), lr=torch.ones(2)), ValueError, "lr .*1-element"),
        (lambda: gradsel.MaskedAdam(one_parameter(), masks=MASKS), ValueError, r"model\.named_parameters"),
        (lambda: gradsel.MaskedAdam(named_parameter(), masks=torch.ones(2)), TypeError, "Selection.*Tensor"),
        (lambda: gradsel.MaskedAdam(named_parameter(), masks={"w": torch.ones(2, 3)}), TypeError, "w.*Tensor"),
        (lambda: gradsel.MaskedAdam([("v", one_parameter()[0])], masks=MASKS), KeyError, "'v'"),
        (lambda: gradsel.MaskedAdam(named_parameter((3, 2)), masks=MASKS), ValueError, r"mask of w .*shape"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(2, 3).to_sparse(), "sparse.*SparseAdam"),
        (None, "complex"),
    ],
)
def test_sparse_and_complex_gradients(grad, message):
    parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64 if grad is None else torch.float32))
    parameter.grad = torch.ones_like(parameter) if grad is None else grad
    with pytest.raises(RuntimeError, match=message):
        gradsel.MaskedAdam([parameter]).step()
