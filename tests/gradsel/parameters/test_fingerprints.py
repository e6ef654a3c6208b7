"""Fingerprints of weights, and selections that recognise their model by them."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import nn

import gradsel
from gradsel.parameters.fingerprints import fingerprint, fingerprints
from tests.support.toy import Toy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (40, 50), (3, 4, 5, 6)], ids=str)
def test_fingerprints_are_of_logical_entries(shape, dtype):
    weight = (torch.randn(shape) * 10).to(dtype)
    text = fingerprint(weight)
    size, kind, digest = text.split(" ")
    assert (size, kind) == ("x".join(map(str, shape)) or "scalar", str(dtype).removeprefix("torch."))
    flat = weight.reshape(-1)
    count = min(256, flat.numel())
    sample = torch.stack([flat[i * flat.numel() // count] for i in range(count)]) if count else flat
    raw = bytes(sample.view(torch.uint8).tolist())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    total = sum(weight.contiguous().view(integers).reshape(-1).tolist())
    total = (total + 2**63) % 2**64 - 2**63  # wraps around as 64-bit integers do
    assert digest == hashlib.blake2b(raw + str(total).encode(), digest_size=8).hexdigest()
    assert fingerprint(nn.Parameter(weight, requires_grad=False)) == text
    if weight.ndim == 4:
        assert fingerprint(weight.to(memory_format=torch.channels_last)) == text
    if weight.ndim == 2:
        assert fingerprint(weight.t().contiguous().t()) == text
    if weight.numel() > 1 and dtype is not torch.bool:
        assert fingerprint(weight + 1) != text
        weight.view(-1)[-1].zero_().add_(
            1 if flat[-1] == 0 else 0
        )  # a single entry, which sampling a large tensor misses
        assert fingerprint(weight) != text


def test_fingerprints_know_wrapped_models_by_their_names():
    model = Toy()
    wrapped = nn.Module()
    wrapped.module = model
    assert fingerprints(wrapped) == fingerprints(model)
    assert list(fingerprints(model)) == [name for name, _ in model.named_parameters()]


def selection_on(model):
    masks = gradsel.select(model, None, None, criterion="magnitude")
    return gradsel.Selection(masks, masks.notes, fingerprints(model))


def test_a_selection_knows_its_model(tmp_path):
    model = Toy()
    selection = selection_on(model)
    selection.save(tmp_path / "s")
    assert gradsel.Selection.load(tmp_path / "s").base == fingerprints(model)
    loaded = gradsel.Selection.load(tmp_path / "s", copy.deepcopy(model))
    loaded.check(model.double())  # another dtype is not compared
    with pytest.raises(ValueError, match="differ"):
        gradsel.Selection.load(tmp_path / "s", Toy())


def test_other_weights_are_told_by_name_but_not_those_trained_whole():
    model = Toy()
    selection = selection_on(model)
    with torch.no_grad():
        model.head.weight += 1
        model.blocks[0].fc1.bias += 1
    selection.check(model)
    with torch.no_grad():
        model.blocks[1].fc1.weight += 1  # ranked
        model.blocks[1].norm.weight += 1  # frozen
    compared = sum(not mask.is_whole for mask in selection.values())
    message = rf"2 of {compared} .*blocks\.1\.norm\.weight.*values=False"
    with pytest.raises(ValueError, match=message):
        selection.check(model)
    selection.check(model, values=False)
    gradsel.Selection(selection).check(model)  # has no fingerprints


def test_other_models_are_told_by_their_parameters():
    model = Toy()
    selection = selection_on(model)
    renamed_model = Toy()
    renamed_model.backbone = renamed_model.blocks
    del renamed_model.blocks
    message = (
        r"model .*18 parameters \(blocks\.0\.gamma, .*15 more.*backbone\.0\.gamma.*"
        r"selection .*18 parameters \(backbone\.0\.gamma"
    )
    with pytest.raises(ValueError, match=message):
        selection.check(renamed_model, values=False)
    with pytest.raises(ValueError, match=r"shapes .*2 parameters .*head\.weight .*4x12 .*7x12"):
        selection.check(Toy(classes=7), values=False)
