"""Casts and moves of attached models, whichever way torch makes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import gradsel
from gradsel.attached import SUFFIX
from tests.support.every_layer import RULES, NotRecurrent, check_forward, every_layer, inputs, loss, train
from tests.support.hugging_face import hugging_face
from tests.support.selections import KINDS, check_consistent, check_frozen, frozen_entries, random_selection

FLAGS: dict[str, Callable[[bool], None]] = {
    "in place": lambda _: None,
    "swapped": torch.__future__.set_swap_module_params_on_conversion,
    "overwritten": torch.__future__.set_overwrite_module_params_on_conversion,
}


@pytest.fixture(params=FLAGS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How torch converts parameters."""
    FLAGS[request.param](True)
    yield request.param
    FLAGS[request.param](False)


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "cpu": nn.Module.cpu,  # changes nothing
    "cloned": lambda model: model._apply(torch.clone),
    "shared": nn.Module.share_memory,
}


@pytest.mark.supports("bf16", "merge")
@pytest.mark.supports("fp16", "merge")
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_carry_everything_through(kind: str, conversion: str, way: str) -> None:
    """Weights, values with all their digits, gradients, masks; in a copy, too."""
    model = every_layer()
    model.recurrent = NotRecurrent()  # torch cannot swap those of recurrent layers
    plain = copy.deepcopy(model)
    selection = random_selection(model, kind, **RULES)
    gradsel.attach(model, selection)
    loss(model).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(SUFFIX)}
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert CONVERSIONS[conversion](each) is each
        for name, values in before.items():
            now = each.get_parameter(name)
            assert torch.equal(now, values.to(now.dtype)), name
            if each is model:
                assert now.grad.dtype is now.dtype
        check_forward(each, plain)
        check_consistent(each)
        frozen = frozen_entries(each, selection)
        train(each)
        check_frozen(each, selection, frozen)
        check_consistent(each)
        each.load_state_dict(copy.deepcopy(each.state_dict()))
    model.float()
    train(model)
    gradsel.detach(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert not any("_apply" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_model_is_converted(kind: str, way: str) -> None:
    model = every_layer()
    model.recurrent = NotRecurrent()
    plain = copy.deepcopy(model)
    gradsel.attach(model, random_selection(model, kind, **RULES))
    model.linear.double().float()
    train(model)
    check_forward(model, plain)
    check_consistent(model)


def test_pruned_layers_are_converted(way: str) -> None:
    """Their weight has another name, which comes after that of the values."""
    model = every_layer()
    model.recurrent = NotRecurrent()
    gradsel.attach(model, random_selection(model, **RULES))
    with torch.no_grad():
        model.linear.weight_values.mul_(1 / 3)
    values = model.linear.weight_values.detach().clone()
    prune.identity(model.linear, "weight")
    for convert in (model.bfloat16, model.double):
        convert()
        assert torch.equal(model.linear.weight_values, values.to(model.linear.weight_values.dtype))
        loss(model).backward()
    prune.remove(model.linear, "weight")
    check_consistent(model)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_stay_tied(kind: str, way: str) -> None:
    model, _ = hugging_face("tied Llama")
    gradsel.attach(model, random_selection(model, kind, rank=["model.embed_tokens.weight"]))
    embedding, head = model.model.embed_tokens, model.lm_head
    model.double()
    head.float()  # a part that shares its weight with another
    model.double()
    if kind != "whole":  # torch itself unties whole ones when it overwrites them
        assert head._parameters["weight_values"] is embedding._parameters["weight_values"]
        assert head.weight is embedding.weight
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    gradsel.Delta.of(model)


def test_to_the_meta_device_and_back(way: str) -> None:
    """Where nothing is kept, a checkpoint brings all of it."""
    model = every_layer()
    model.recurrent = NotRecurrent()
    plain = copy.deepcopy(model)
    gradsel.attach(model, random_selection(model, **RULES))
    train(model)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        output = model(inputs())
    model.zero_grad()
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(inputs()), output)
    check_forward(model, plain)
