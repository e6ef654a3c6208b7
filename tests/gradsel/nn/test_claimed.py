"""Models that DeepSpeed has taken over are refused by what it leaves on them; stand-ins do so here without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from tests.support.selections import data, toy
from tests.support.toy import cross_entropy

ZERO3 = r"patch_embed.weight .*ZeRO-3.*stage 0, 1 or 2"


class DeepSpeedEngine(nn.Module):
    """What an engine is: a module around the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def partition(model: nn.Module) -> nn.Module:
    """What ZeRO-3 does."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
        parameter.data = torch.empty(0)
    return model


def test_partitioned_models_are_neither_selected_in_nor_attached() -> None:
    _, selection = toy()
    model = partition(toy()[0])
    with pytest.raises(ValueError, match=r"cls_token .*ZeRO-3.*select\(\)"):
        gradsel.select(model, data(), cross_entropy)
    with pytest.raises(ValueError, match=r"cls_token .*ZeRO-3.*attach\(\)"):
        gradsel.attach(model, selection)
    with pytest.raises(ValueError, match=r"cls_token .*ZeRO-3.*MaskedAdam"):
        gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    assert not gradsel.attached.is_attached(model)


def test_an_attached_model_is_not_partitioned() -> None:
    model, selection = toy()
    gradsel.attach(model, selection)
    expected = model.patch_embed.weight.detach().clone()
    with pytest.raises(RuntimeError, match=ZERO3):
        partition(model)
    assert torch.equal(model.patch_embed.weight, expected)


@pytest.mark.parametrize("inside", [True, False])
def test_models_of_an_engine_are_not_attached(inside: bool) -> None:
    """ZeRO-1 and 2 keep on parameters where the optimizer has them."""
    model, selection = toy()
    if inside:
        for parameter in model.parameters():
            parameter._hp_mapping = None  # another rank has it
        model.head.weight._hp_mapping = object()
    with pytest.raises(ValueError, match=r"DeepSpeed engine.*attach\(\) the model first"):
        gradsel.attach(model if inside else DeepSpeedEngine(model), selection)
    assert not gradsel.attached.is_attached(model)


@pytest.mark.parametrize("how", ["masks", "masks of a group", "policy", "masks from policy"])
def test_masks_of_parameters_that_zero_has_flattened_are_missed(how: str) -> None:
    """The optimizer is given one tensor in place of all, which it must not train as a whole."""
    model, selection = toy()
    named = [(name, parameter) for name, parameter in model.named_parameters() if "unused" not in name]
    if how == "masks":
        optimizer = gradsel.MaskedAdam(named, masks=selection)
    elif how == "masks of a group":
        optimizer = gradsel.MaskedAdam([{"params": named, "masks": selection}])
    else:
        optimizer = gradsel.MaskedAdam(named, policy=gradsel.PerNeuron(1), rules={"freeze": ["unused.*"]}, model=model)
    if how == "masks from policy":
        cross_entropy(model, data()[0]).backward()
        optimizer.step()
    flat = torch.cat([parameter.detach().view(-1) for _, parameter in named]).requires_grad_()
    before = flat.detach().clone()
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(KeyError, match=r"by hand.*DeepSpeed.*attach\(\) the model first"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_flattened_values_are_trained_saved_and_loaded() -> None:
    """The names of a group are still those of its parameters before they were flattened."""
    model, selection = toy()
    gradsel.attach(model, selection)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    flat = torch.cat([parameter.detach().view(-1) for _, parameter in named]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    saved = []
    for _ in range(2):
        optimizer = gradsel.MaskedAdam(named, lr=0.1)
        optimizer.param_groups[0]["params"] = [flat]
        if saved:
            optimizer.load_state_dict(saved[0])
        optimizer.step()
        saved.append(optimizer.state_dict())
    states = [each["state"][0] for each in saved]
    assert states[1]["step"] == 2
    assert torch.equal(states[1]["exp_avg"], torch.full_like(flat, 0.9 * 0.1 + 0.1))


def test_the_linear_function_that_zero_3_leaves_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for the rest of the process, whatever is trained next. Other replacements may do as they like."""
    model, selection = toy()
    gradsel.attach(model.eval(), selection)
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: linear(*args))
    expected = cross_entropy(model, data()[0])
    nn.functional.linear.__module__ = "deepspeed.runtime.zero.linear"
    with pytest.raises(RuntimeError, match=r"replaced torch.nn.functional.linear.*start a new process"):
        cross_entropy(model, data()[0])
    monkeypatch.undo()
    assert torch.equal(cross_entropy(model, data()[0]), expected)
