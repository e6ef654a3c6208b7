"""Checkpoints that are loaded into attached models: plain ones, their own, and those of another selection."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.parallel
from torch import nn

import gradsel
from gradsel.attached import SUFFIX
from gradsel.masks import Flat
from tests.support.every_layer import (
    attached,
    every_layer,
    inputs,
    plain_state,
    train,
    trained_in_part,
)
from tests.support.selections import KINDS, PARTIAL, check_consistent


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loaded_after_attach_is_the_new_base(kind: str) -> None:
    model, _, _ = attached(kind)
    pretrained = every_layer(seed=7)
    with pytest.warns(UserWarning, match=r"trained parameters .*tokens.weight.* are the new originals") as warned:
        model.load_state_dict(pretrained.state_dict())
    assert len(warned) == 1
    state = copy.deepcopy(model.state_dict())
    held = {"lr": 0.05, "anchor": 9.0, "anchor_decoupled": True}
    train(model, 30, gradsel.MaskedAdam(gradsel.trainable_parameters(model), **held))
    for name, tensor in model.state_dict().items():
        assert (tensor - state[name]).abs().max() < 0.2, name  # near where 30 steps of 0.05 began
    tuned = copy.deepcopy(pretrained)
    gradsel.load_delta(tuned, gradsel.Delta.of(model))
    assert torch.equal(tuned(inputs()), model(inputs()))
    gradsel.detach(model, restore=True)
    for (name, p), q in zip(model.named_parameters(), pretrained.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("kind", PARTIAL)
def test_values_of_another_selection_are_refused(kind: str, metadata: bool) -> None:
    model, plain, selection = attached(kind)
    before = copy.deepcopy(model.state_dict())
    for name, mask in selection.items():
        other_entries = mask.to_dense().flip(-1)
        if not mask.nnz or mask.is_whole or torch.equal(other_entries, mask.to_dense()):
            continue
        other = every_layer(seed=3)
        masks = {key: Flat.from_dense(each.to_dense()) if each.nnz else each for key, each in selection.items()}
        own = copy.deepcopy(plain)
        gradsel.attach(own, gradsel.Selection(masks))
        gradsel.attach(other, gradsel.Selection({**masks, name: Flat.from_dense(other_entries)}))
        state = other.state_dict()
        with pytest.raises(RuntimeError, match=rf"{name}{SUFFIX} .*another selection"):
            own.load_state_dict(state if metadata else dict(state))
        assert all(
            torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items() if key in plain.state_dict()
        )


@pytest.mark.supports("bf16", "save/load")
@pytest.mark.parametrize("kind", KINDS)
def test_shards_in_any_order_resume_exactly(kind: str) -> None:
    model, _, selection = attached(kind, torch.bfloat16)
    train(model)
    items = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    for order in (items, items[::-1], items[1::2] + items[::2]):
        other = every_layer(torch.bfloat16)
        gradsel.attach(other, selection)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a shard of weights alone is taken for a plain checkpoint at first
            for start in range(0, len(order), 7):
                other.load_state_dict(dict(order[start : start + 7]), strict=False)
        for name, tensor in items:
            assert torch.equal(other.state_dict()[name], tensor), name


def test_a_checkpoint_with_whole_parameters_only_resumes_where_it_stopped() -> None:
    """Its metadata tells it from a plain one, so the base stays."""
    model, plain, selection = attached("whole")
    train(model)
    other = copy.deepcopy(plain)
    gradsel.attach(other, selection)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    gradsel.detach(other, restore=True)
    for p, q in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_dict_taken_before_values_were_written_loads() -> None:
    """Its weights are older than its values, which count."""
    model, _, selection = attached()
    state = model.state_dict()
    with torch.no_grad():
        for _, module, short in trained_in_part(model):
            module._parameters[short + SUFFIX].add_(1.0)
    other = every_layer()
    gradsel.attach(other, selection)
    other.load_state_dict(copy.deepcopy(state))
    check_consistent(other)
    assert torch.equal(other(inputs()), model(inputs()))


def test_parameters_saved_by_themselves_are_plain() -> None:
    """As users do who save what is trained: the file needs no trust, and holds no masks or originals."""
    model, plain, selection = attached()
    train(model)
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(type(p) is nn.Parameter for p in saved.values())
    other = copy.deepcopy(plain)
    gradsel.attach(other, selection)
    other.load_state_dict({name: p for name, p in saved.items() if p.requires_grad}, strict=False)
    assert torch.equal(other(inputs()), model(inputs()))
    check_consistent(other)


@pytest.mark.parametrize("kind", ["per-row", "whole"])
def test_trained_weights_without_metadata_are_loaded_as_the_warning_says(kind: str) -> None:
    """As those of a safetensors file, which has no metadata, where nothing is trained in part."""
    model, plain, selection = attached(kind)
    train(model)
    trained = {name: tensor.clone() for name, tensor in plain_state(model, plain).items()}
    other = copy.deepcopy(plain)
    gradsel.attach(other, selection)
    with pytest.warns(UserWarning, match=r"no values .* no metadata .*load the original .*parameter.copy_"):
        other.load_state_dict(trained)
    assert torch.equal(other(inputs()), model(inputs()))
    with pytest.warns(UserWarning, match="are the new originals"):
        other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for name, _ in plain.named_parameters():
            other.get_parameter(name).copy_(trained[name])
    assert torch.equal(other(inputs()), model(inputs()))
    gradsel.detach(other, restore=True)
    assert torch.equal(other(inputs()), plain(inputs()))


def test_a_part_of_the_model_is_loaded() -> None:
    model, _, _ = attached()
    with pytest.warns(UserWarning, match=r"2 trained parameters \(linear.weight, linear.bias\) are the new originals"):
        model.linear.load_state_dict(nn.Linear(8, 8).state_dict())
    check_consistent(model)
