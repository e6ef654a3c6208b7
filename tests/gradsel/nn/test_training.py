"""Attached models in everyday training: clipping, scaling, checkpointing, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsel
from gradsel.attached import selected_in
from gradsel.masks import PerRow
from tests.support.selections import check_consistent, check_frozen, data, frozen_entries, mask_gradients, toy
from tests.support.toy import cross_entropy


def test_masked_adam_makes_one_call_and_needs_no_hook(monkeypatch):
    model, selection = toy()
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model))
    calls = []
    original = gradsel.optim.stepping.gk.masked_adam_
    monkeypatch.setattr(gradsel.optim.stepping.gk, "masked_adam_", lambda *a, **k: calls.append(1) or original(*a, **k))
    monkeypatch.setattr(PerRow, "scatter_", lambda *a: pytest.fail("the kernel writes the weights"))
    cross_entropy(model, data()[0]).backward()
    optimizer.step()
    assert len(calls) == 1
    check_consistent(model)


def test_masks_and_attach_exclude_each_other():
    model, selection = toy()
    gradsel.attach(model, selection)
    with pytest.raises(ValueError, match="leave out masks"):
        gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    with pytest.raises(ValueError, match=r"attached.*gradsel\.detach\(model\)"):
        gradsel.attach(model, selection)
    with pytest.raises(ValueError, match="attached"):
        gradsel.select(model, data(), cross_entropy)


def test_gradient_accumulation_and_clipping():
    model, selection = toy(dtype=torch.float64)
    dense = copy.deepcopy(model)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    for trained in (model, dense):
        for i, batch in enumerate(data(torch.float64)):
            torch.manual_seed(i)
            (cross_entropy(trained, batch) / 3).backward()
    mask_gradients(dense, selection)
    ours = nn.utils.clip_grad_norm_(gradsel.trainable_parameters(model), 0.1)
    theirs = nn.utils.clip_grad_norm_([p for p in dense.parameters() if p.requires_grad], 0.1)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
    layer = model.blocks[1].qkv
    expected = selected_in(layer)["weight"].mask.gather(dense.blocks[1].qkv.weight.grad)
    torch.testing.assert_close(layer.weight_values.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.supports("fp16", "attach", "MaskedAdam")
def test_grad_scaler_skips_an_overflow():
    model, selection = toy(dtype=torch.float16)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    start = copy.deepcopy(model.state_dict())
    parameters = [p for name, p in model.named_parameters() if name.endswith("_values")]  # in float32, as scalers need
    optimizer = gradsel.MaskedAdam(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i, batch in enumerate(data(torch.float16)):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, batch)).backward()
        if i == 0:
            parameters[0].grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, start[name]) for name, p in model.state_dict().items() if "bn." not in name)
        assert unchanged == (i == 0)
    assert scaler.get_scale() < 8
    check_consistent(model)
    check_frozen(model, selection, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model, selection = toy(dtype=torch.float64)
    gradsel.attach(model, selection)
    x = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)

    def grads(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.blocks[0].parameters() if p.requires_grad]

    plain = grads(model.blocks[0])
    again = grads(lambda x: checkpoint(model.blocks[0], x, use_reentrant=reentrant))
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left, right)


def test_torch_compile_has_no_graph_breaks():
    model, selection = toy()
    gradsel.attach(model, selection)
    x = torch.randn(2, 3, 8, 8)

    def grads(run):
        model.zero_grad()
        torch.manual_seed(0)
        loss = run(x).square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in gradsel.trainable_parameters(model) if p.grad is not None)]

    model.eval()
    expected = grads(model)
    torch._dynamo.reset()
    for left, right in zip(expected, grads(torch.compile(model, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(left, right)


def test_optimizers_that_would_leave_values_out_are_reported():
    model, selection = toy("irregular")
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cross_entropy(model, data()[0]).backward()
    early.step()
    gradsel.attach(model, selection)
    cross_entropy(model, data()[0]).backward()
    with pytest.warns(UserWarning, match=r"holds patch_embed.weight.*patch_embed.weight_values.*trainable_parameters"):
        early.step()
    trained = gradsel.trainable_parameters(model)
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    later = gradsel.MaskedAdamW(groups, lr=1e-2)
    cross_entropy(model, data()[0]).backward()
    with pytest.warns(UserWarning, match=r"patch_embed.weight.*one dimension.*by names"):
        later.step()
