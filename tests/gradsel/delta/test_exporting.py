"""Full checkpoints exported from attached models load without this library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from gradsel.delta.delta import Delta
from gradsel.delta.exporting import export
from tests.support.deltas import assert_same, plain, trained
from tests.support.selections import KINDS, random_selection


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_without_this_library(kind, tmp_path):
    from safetensors.torch import load_file

    base, _, model = trained(kind, torch.bfloat16)
    export(model, tmp_path / "full.safetensors")
    state = load_file(tmp_path / "full.safetensors")
    assert state.keys() == base.state_dict().keys()
    base.load_state_dict(state)
    assert_same(base, plain(model).state_dict())
    export(base, tmp_path / "plain.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "full.safetensors").read_bytes()


def test_tied_weights_are_exported_under_each_name(tmp_path):
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    gradsel.attach(model, random_selection(model))
    export(torch.compile(model, backend="eager"), tmp_path / "f")
    assert load_file(tmp_path / "f").keys() == {"0.weight", "1.weight"}


@pytest.mark.parametrize("name", ["full.pt", "full.PTH", "pytorch_model.bin"])
def test_suffixes_of_pickles_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.*torch\.save.*\*\.safetensors"):
        export(nn.Linear(4, 4), tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir()
    export(nn.Linear(4, 4), tmp_path / name)  # a folder may have any name
    assert (tmp_path / name / "model.safetensors").exists()


def test_a_base_given_for_an_attached_model_is_compared():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradsel.attach(model, gradsel.select(model, None, None, criterion="random", freeze=["1.bias"]))
    with torch.no_grad():
        model[0].weight_values.add_(1)
    gradsel.sync(model)
    assert set(Delta.of(model, base=base)) == {"0.weight", "0.bias", "1.weight"}
    with pytest.raises(ValueError, match=r"0\.weight .*attach\(\)"):
        Delta.of(model, base={name: tensor + 1 for name, tensor in base.items()})
    with torch.no_grad():
        model[1].bias.add_(1)
    with pytest.raises(ValueError, match=r"1\.bias .*attach\(\)"):
        Delta.of(model, base=base)
