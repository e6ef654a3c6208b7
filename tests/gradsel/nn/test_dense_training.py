"""Attached training gives the same losses and weights as training with dense masked gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsel
from tests.support.hugging_face import hugging_face, model_loss
from tests.support.selections import (
    KINDS,
    check_consistent,
    check_frozen,
    data,
    frozen_entries,
    mask_gradients,
    random_selection,
    toy,
)
from tests.support.toy import cross_entropy

RULES = {"tied Llama": {"rank": ["model.embed_tokens.weight"]}, "GPT-2": {"rank": ["transformer.wte.weight"]}}


@pytest.mark.supports("CPU", "attach", "other optimizers", "merge")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "Llama", "tied Llama", "GPT-2"])
def test_double_precision_equals_dense_training_with_masked_gradients(name, kind):
    """With plain gradient descent: unlike Adam, it does not normalise differences away."""
    model, inputs = hugging_face(name)
    model = model.double()
    if name == "ConvNeXt":
        for parameter in model.parameters():  # layer scale starts at 1e-6, which would hide the blocks
            if (
                parameter.ndim == 1
                and bool((parameter == parameter[0]).all())
                and 0 < float(parameter[0].detach()) < 1e-3
            ):
                nn.init.constant_(parameter, 0.5)
    dense = copy.deepcopy(model)
    selection = random_selection(model, kind, **RULES.get(name, {}))
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    ours = torch.optim.SGD(gradsel.trainable_parameters(model), lr=0.05)
    for step in range(6):
        batch = inputs[step % len(inputs)]
        losses = []
        for trained in (model, dense):
            trained.zero_grad()
            loss = model_loss(trained, batch)
            loss.backward()
            losses.append(loss.item())
        mask_gradients(dense, selection)
        ours.step()
        with torch.no_grad():
            for parameter in dense.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.05)
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    check_frozen(model, selection, before)
    gradsel.detach(model)
    for (name, left), right in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.supports("CPU", "attach", "MaskedAdam")
@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "Llama"])
def test_single_precision_loss_curve(name):
    """MaskedAdam on an attached model against torch's Adam on masked gradients."""
    model, inputs = hugging_face(name)
    selection = random_selection(model)
    dense = copy.deepcopy(model)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    ours = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-3)
    theirs = torch.optim.Adam([p for p in dense.parameters() if p.requires_grad], lr=1e-3)
    for step in range(20):
        batch = inputs[step % len(inputs)]
        losses = []
        for trained, optimizer in ((model, ours), (dense, theirs)):
            optimizer.zero_grad()
            loss = model_loss(trained, batch)
            loss.backward()
            if trained is dense:
                mask_gradients(dense, selection)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    check_consistent(model)


@pytest.mark.supports("bf16", "attach", "MaskedAdam")
@pytest.mark.supports("fp16", "attach", "MaskedAdam")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_train_in_float32(dtype):
    model, selection = toy(dtype=dtype)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    values = model.blocks[0].fc1.weight_values
    assert values.dtype is torch.float32
    assert torch.equal(values.detach().to(dtype).float(), values.detach())
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-5)  # steps below the weights' precision
    start = values.detach().clone()
    for batch in data(dtype):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    assert (values != start).any()
    assert values.grad.dtype is torch.float32
    check_consistent(model)
    check_frozen(model, selection, before)
