"""A selection printed, saved, loaded and used to freeze a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from tests.support.toy import Toy, batches, cross_entropy


def test_summary():
    selection = gradsel.select(Toy(), batches(), cross_entropy, gradsel.PerNeuron(2))
    text = str(selection)
    count = sum(mask.nnz for mask in selection.values())
    assert selection.trainable_count() == count
    assert f"{count:,} of {sum(p.numel() for p in Toy().parameters()):,} parameters trained" in text
    assert "blocks.*.qkv.weight  x2" in text
    assert "frozen: normalisation" in text
    assert "PerNeuron(k=2), criterion gradient, batches 3" in text
    assert len(text.splitlines()) < 25


def test_save_and_load(tmp_path):
    selection = gradsel.select(Toy(), batches(), cross_entropy, gradsel.PerNeuron(2))
    path = tmp_path / "digits.selection"
    selection.save(path)
    loaded = gradsel.Selection.load(path)
    assert list(loaded) == list(selection)
    assert loaded.notes == selection.notes
    assert str(loaded) == str(selection)
    for name, mask in selection.items():
        assert torch.equal(loaded[name].to_dense(), mask.to_dense())
    assert [p.name for p in tmp_path.iterdir()] == ["digits.selection"]


def test_freeze_sets_the_flags():
    model = Toy()
    selection = gradsel.select(model, batches(), cross_entropy)
    gradsel.freeze(model, selection)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (selection[name].nnz > 0)
    other = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="another model"):
        gradsel.freeze(other, selection)
    assert other.weight.requires_grad
