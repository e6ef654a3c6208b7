"""Selections handed to other tools and back: bits, coordinates and SHiRA adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn

import gradsel
from gradsel.masks import Flat, Frozen, PerRow, Whole, WholeRows
from gradsel.views import NeuronView
from tests.gradsel.selection.cases import int32, random_selection, selection_of


def test_bits_and_coordinates_round_trip():
    selection = gradsel.Selection(
        {
            **random_selection(0),
            "rows": WholeRows(torch.tensor([0, 3], dtype=torch.int32), (5, 40)),
            "transposed": PerRow(int32([0, 1], [1, 3]), (4, 2), NeuronView((1,))),
            "any": Flat(torch.tensor([0, 1, 9]), (5, 4)),
            "scalar": Whole(()),
        }
    )
    shapes = {name: mask.shape for name, mask in selection.items()}
    bits, coo = selection.to_bits(), selection.to_coo()
    assert bits["rows"].shape == (5, 2)
    assert coo["blocks.0.fc1.weight"].shape == (2, 48)
    for again in (gradsel.Selection.from_bits(bits, shapes), gradsel.Selection.from_coo(coo, shapes)):
        assert list(again) == list(selection)
        for name, mask in selection.items():
            assert again[name].kind == mask.kind, name
            assert torch.equal(again[name].to_dense(), mask.to_dense())


def test_what_an_import_lacks_is_frozen_and_what_is_too_much_refused():
    shapes = {"a": (2, 3), "b": (2,)}
    selection = gradsel.Selection.from_coo({"a": torch.tensor([[1], [2]])}, shapes)
    assert (selection["a"].nnz, selection["b"].label) == (1, "nothing selected")
    with pytest.raises(ValueError, match=r"shape .*1 parameter.* c"):
        gradsel.Selection.from_coo({"c": torch.tensor([[1], [2]])}, shapes)
    with pytest.raises(ValueError, match=r"a: .*dimension 0 .*0 to 1.*2"):
        gradsel.Selection.from_coo({"a": torch.tensor([[2], [2]])}, shapes)
    with pytest.raises(TypeError, match="b: bits"):
        gradsel.Selection.from_bits({"b": torch.zeros(2)}, shapes)


class Square(nn.Module):
    """Square layers, where K = 2 r entries per neuron equal SHiRA's r * (in + out)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8), "up": nn.Linear(8, 24)}) for _ in range(2))
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["proj"](x)
        return self.head(self.blocks[1]["up"](x) + self.blocks[0]["up"](x))


def shira(selection, model, r=1, modules=("proj",), **options):
    with pytest.warns(UserWarning, match="supply your own masking function"):
        config = ShiraConfig(r=r, mask_type="gradsel", target_modules=list(modules), **options)
    config.mask_fn = selection.shira_mask_fn(model)
    return get_peft_model(model, config)


def trained_by(adapted, adapter):
    modules = adapted.get_base_model().named_modules()
    return {name for name, module in modules if adapter in getattr(module, "shira_indices", ())}


def assert_indices(adapted, adapter, selection):
    coo = selection.to_coo()
    for name in trained_by(adapted, adapter):
        layer = adapted.get_base_model().get_submodule(name)
        assert torch.equal(layer.shira_indices[adapter].long(), coo[f"{name}.weight"])


def test_shira_trains_the_selected_entries():
    torch.manual_seed(0)
    model = Square()
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(4), "magnitude")
    base = copy.deepcopy(model)
    adapted = shira(selection, model, r=2)
    layers = {
        name: module for name, module in adapted.get_base_model().named_modules() if hasattr(module, "shira_indices")
    }
    assert set(layers) == {"blocks.0.proj", "blocks.1.proj"}
    for name, layer in layers.items():
        assert torch.equal(layer.shira_indices["default"].long(), selection.to_coo()[f"{name}.weight"])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    merged = adapted.merge_and_unload()
    for name, parameter in base.named_parameters():
        moved = merged.get_parameter(name) != parameter
        assert not moved.any() or (torch.equal(moved, selection[name].to_dense()) and "proj" in name)
    assert (merged.blocks[0]["proj"].weight != base.blocks[0]["proj"].weight).any()


def test_shira_adapters_come_back_as_selections(tmp_path):
    model = Square()
    original = copy.deepcopy(model)
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(2), "magnitude")
    adapted = shira(selection, model, modules_to_save=["head"])
    adapted.save_pretrained(tmp_path)
    for again in (adapted, PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)):
        found = gradsel.Selection.from_shira(again)
        assert set(found) == set(selection)
        for name, mask in found.items():
            if "proj.weight" in name:
                assert mask.kind == "per-row"
                assert torch.equal(mask.to_dense(), selection[name].to_dense())
            else:
                assert mask.label == ("whole" if name.startswith("head") else "not adapted")
    gradsel.attach(original, found)
    with pytest.raises(ValueError, match=r"SHiRA .*'other'"):
        gradsel.Selection.from_shira(adapted, "other")


def test_a_shira_mask_may_be_of_any_kind():
    model = Square()
    dense = torch.zeros(8, 8, dtype=torch.bool)
    dense.view(-1)[torch.randperm(64)[:16]] = True
    masks = {name: Frozen(p.shape) for name, p in model.named_parameters()}
    for mask in (Flat.from_dense(dense), WholeRows(torch.tensor([1, 6], dtype=torch.int32), (8, 8))):
        selection = gradsel.Selection({**masks, "blocks.0.proj.weight": mask})
        adapted = shira(selection, copy_of := copy.deepcopy(model), modules=["blocks.0.proj"])
        layer = adapted.get_base_model().blocks[0]["proj"]
        assert layer.base_layer is not model.blocks[0]["proj"]
        assert copy_of.blocks[0]["proj"] is layer
        assert torch.equal(layer.shira_indices["default"].long(), selection.to_coo()["blocks.0.proj.weight"])


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["proj"], r"proj\.weight .*32 .*r \* \(in \+ out\) = 16 .*r = 1.*r = 2"),
        (["head"], r"head\.weight .*72 .*multiple of 27"),
        (["unseen"], r"unseen\.weight .*0 "),
    ],
)
def test_counts_that_shira_cannot_have_are_refused(modules, message):
    model = Square()
    model.unseen = nn.Linear(4, 4)
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(4), "magnitude", freeze=["unseen.*"])
    with pytest.raises(ValueError, match=message):
        shira(selection, model, modules=modules)


def test_layers_with_other_counts_get_adapters_of_their_own():
    """Four entries per neuron are 2 * (8 + 8) of one layer and 3 * (8 + 24) of the other."""
    model = Square()
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(4), "magnitude")
    adapted = shira(selection, model, r=2)
    with pytest.warns(UserWarning, match="supply your own masking function"):
        wider = ShiraConfig(r=3, mask_type="gradsel", target_modules=["up"])
    wider.mask_fn = selection.shira_mask_fn(model)
    adapted.add_adapter("up", wider)
    adapted.base_model.set_adapter(["default", "up"])
    assert model.blocks[0]["proj"].shira_weight["default"].requires_grad
    assert model.blocks[0]["up"].shira_weight["up"].requires_grad
    assert trained_by(adapted, "up") == {"blocks.0.up", "blocks.1.up"}
    for adapter in ("default", "up"):
        assert_indices(adapted, adapter, selection)


def test_shira_of_another_model_is_refused():
    model, other = Square(), Square()
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(2), "magnitude")
    mask_fn = selection.shira_mask_fn(model)
    with pytest.raises(ValueError, match="shira_mask_fn"):
        mask_fn(other.head, 1)
    with pytest.raises(ValueError, match=r"'head\.weight'"):
        selection_of(a=Whole((2,))).shira_mask_fn(model)(model.head, 1)
    with pytest.raises(ValueError, match=r"head\.weight .*\[2\] .*\[3, 24\]"):
        selection_of(**{"head.weight": Whole((2,))}).shira_mask_fn(model)(model.head, 1)
