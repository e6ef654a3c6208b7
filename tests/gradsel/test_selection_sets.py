"""Looking at selections, comparing and combining them, and handing them to other tools and back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn

import gradsel
from gradsel.demo import plots
from gradsel.masks import Flat, Frozen, PerRow, Whole, WholeRows
from gradsel.parameters.blocks import split_names
from gradsel.views import NeuronView
from tests.gradsel.toy import Toy, batches, cross_entropy


def random_selection(seed, k=2):
    return gradsel.select(Toy(), None, None, gradsel.PerNeuron(k), gradsel.random_scores(seed=seed))


def selection_of(**masks):
    return gradsel.Selection(masks)


def int32(*rows):
    return torch.tensor(rows, dtype=torch.int32)


VIT = {
    "patch_embed.proj.weight": ("", "patch_embed.proj.weight"),
    "blocks.3.norm1.weight": ("blocks.3", "norm1.weight"),
    "blocks.3.attn.qkv.weight": ("blocks.3", "attn.qkv.weight"),
    "blocks.11.attn.qkv.weight": ("blocks.11", "attn.qkv.weight"),
    "blocks.11.gamma": ("blocks.11", "gamma"),
    "head.0.weight": ("", "head.0.weight"),
    "prompts.0": ("", "prompts.0"),
}
TORCHVISION_VIT = {
    "encoder.layers.encoder_layer_3.self_attention.out_proj.weight": (
        "encoder.layers.encoder_layer_3",
        "self_attention.out_proj.weight",
    ),
    "encoder.layers.encoder_layer_3.mlp.0.weight": ("encoder.layers.encoder_layer_3", "mlp.0.weight"),
    "encoder.layers.encoder_layer_3.mlp.3.weight": ("encoder.layers.encoder_layer_3", "mlp.3.weight"),
}
SWIN = {
    "encoder.layers.2.blocks.5.attn.qkv.weight": ("encoder.layers.2.blocks.5", "attn.qkv.weight"),
    "encoder.layers.2.blocks.5.norm.weight": ("encoder.layers.2.blocks.5", "norm.weight"),
    "encoder.layers.0.blocks.1.mlp.fc1.weight": ("encoder.layers.0.blocks.1", "mlp.fc1.weight"),
    "encoder.layers.2.downsample.reduction.weight": ("encoder.layers.2", "downsample.reduction.weight"),
}
TORCHVISION_SWIN = {
    "features.0.0.weight": ("features.0.0", "weight"),
    "features.1.1.attn.qkv.weight": ("features.1.1", "attn.qkv.weight"),
    "features.1.1.mlp.3.weight": ("features.1.1", "mlp.3.weight"),
    "features.2.reduction.weight": ("features.2", "reduction.weight"),
}
MOE = {
    "model.layers.3.self_attn.q_proj.weight": ("model.layers.3", "self_attn.q_proj.weight"),
    "model.layers.3.mlp.gate.weight": ("model.layers.3", "mlp.gate.weight"),
    "model.layers.3.mlp.experts.0.up_proj.weight": ("model.layers.3", "mlp.experts.*.up_proj.weight"),
    "model.layers.3.mlp.experts.17.up_proj.weight": ("model.layers.3", "mlp.experts.*.up_proj.weight"),
}
RESNET = {
    "layer1.0.conv1.weight": ("layer1.0", "conv1.weight"),
    "layer2.0.downsample.0.weight": ("layer2.0", "downsample.0.weight"),
    "fc.weight": ("", "fc.weight"),
}


@pytest.mark.parametrize("names", [VIT, TORCHVISION_VIT, SWIN, TORCHVISION_SWIN, MOE, RESNET])
def test_names_are_split_into_block_and_type(names):
    assert split_names(names) == names


def test_by_block_counts_every_entry_once():
    model = Toy()
    blocks = random_selection(0).by_block()
    assert sum(part.total for part in blocks.values()) == sum(p.numel() for p in model.parameters())
    assert blocks["blocks.1", "fc1.weight"] == blocks["blocks.0", "fc1.weight"]
    part = blocks["blocks.1", "fc1.weight"]
    assert (part.trained, part.total, part.ranked, part.label) == (48, 288, 48, "per-row")
    head = blocks["", "head.weight"]
    assert (head.trained, head.ranked, head.label) == (48, 0, "whole")
    assert blocks["blocks.0", "norm.weight"].label == "frozen: normalisation"
    text = str(blocks)
    assert len(text.splitlines()) == len(blocks) + 1
    assert text.count("blocks.1") == 1
    assert "16.67 %" in text


def test_experts_are_counted_together():
    masks = {f"layers.0.experts.{i}.up.weight": PerRow(int32([i], [1]), (2, 3)) for i in range(3)}
    masks["layers.0.experts.3.up.weight"] = Frozen((2, 3), "no gradient")
    (part,) = gradsel.Selection(masks).by_block().values()
    assert (part.trained, part.total, part.label) == (6, 24, "per-row, frozen: no gradient")


def test_shares_are_those_of_the_ranked_entries():
    shares = random_selection(0).by_block().shares()
    assert math.isclose(sum(share for by_block in shares.values() for share in by_block.values()), 1)
    assert set(shares) == {"patch_embed.weight", "unused.weight", "qkv.weight", "fc1.weight", "fc2.weight"}
    ranked = 2 * (12 + 3 + 2 * (36 + 24 + 12))
    assert shares["qkv.weight"] == {"": 0.0, "blocks.0": 72 / ranked, "blocks.1": 72 / ranked}
    inside = gradsel.select(Toy(), None, None, criterion="random", freeze=["patch_embed.*", "unused.*"])
    assert list(inside.by_block().shares()["fc1.weight"]) == ["blocks.0", "blocks.1"]
    assert selection_of(bias=Whole((3,))).by_block().shares() == {}


def test_plots_show_shares_and_overlaps(tmp_path):
    drawing, (left, right, empty) = plots.figure(3, 12, 4)
    selection = random_selection(0)
    plots.distribution(left, selection.by_block().shares())
    heights = [0.0] * 3
    for bars in left.containers:
        heights = [height + bar.get_height() for height, bar in zip(heights, bars, strict=True)]
    part_of = selection.by_block()
    ranked = dict.fromkeys(("", "blocks.0", "blocks.1"), 0)
    for (block, _), part in part_of.items():
        ranked[block] += part.ranked
    assert heights == pytest.approx([100 * count / sum(ranked.values()) for count in ranked.values()])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["outside", "blocks.0", "blocks.1"]
    plots.overlap(right, ["pets", "cars"], [[1.0, 0.25], [0.25, math.nan]])
    assert [text.get_text() for text in right.texts] == ["100", "25", "25", "-"]
    plots.distribution(empty, selection_of(bias=Whole((3,))).by_block().shares())
    plots.save(drawing, tmp_path / "plots.png")
    assert (tmp_path / "plots.png").stat().st_size > 1000


def test_overlap_agrees_with_the_dense_masks():
    a, b = random_selection(0), random_selection(1, k=3)
    overlap = a.overlap(b)
    ranked = [name for name, mask in a.items() if not mask.is_whole]
    dense = {name: (a[name].to_dense(), b[name].to_dense()) for name in a}
    assert set(overlap.parameters) == set(ranked)
    for name in ranked:
        x, y = dense[name]
        part = overlap.parameters[name]
        assert (part.shared, part.a, part.b) == (int((x & y).sum()), int(x.sum()), int(y.sum()))
    shared = sum(int((x & y).sum()) for name, (x, y) in dense.items() if name in ranked)
    either = sum(int((x | y).sum()) for name, (x, y) in dense.items() if name in ranked)
    assert 0 < overlap.shared == shared
    assert overlap.share == shared / sum(a[name].nnz for name in ranked)
    assert overlap.jaccard == shared / either
    everything = a.overlap(b, whole=True)
    assert everything.shared == shared + sum(mask.nnz for mask in a.values() if mask.is_whole)
    assert f"{100 * overlap.jaccard:.1f} %" in str(overlap).splitlines()[-1]
    assert "blocks.0.fc1.weight" in str(overlap)
    assert "head" not in str(overlap)
    assert (a.overlap(a).share, a.overlap(a).jaccard) == (1, 1)
    nothing = selection_of(w=Frozen((2, 3)))
    assert math.isnan(nothing.overlap(nothing).share)
    one_sided = selection_of(w=PerRow(int32([0], [1]), (2, 3))), selection_of(w=Whole((2, 3)))
    for x, y in (one_sided, one_sided[::-1]):
        assert not x.overlap(y).parameters
        assert x.overlap(y, whole=True).shared == 2
    with pytest.raises(AttributeError):
        overlap.shared = 3


@pytest.mark.parametrize(
    "combine", [lambda a, b: a.overlap(b), lambda a, b: a | b, lambda a, b: a & b, lambda a, b: a - b]
)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            selection_of(**{"fc.weight": Whole((2, 3))}),
            selection_of(**{"fc1.weight": Whole((2, 3))}),
            r"the other lacks 1 parameter \(fc\.weight\); did you mean fc1\.weight\?; this selection lacks 1 parameter",
        ),
        (
            selection_of(w=Whole((2, 3))),
            selection_of(w=Whole((3, 2))),
            "shapes differ in 1 parameter .*: w is 2x3 in this selection, 3x2 in the other",
        ),
        (
            selection_of(**{f"w{i}": Whole((2,)) for i in range(5)}),
            selection_of(w0=Whole((2,))),
            r"lacks 4 parameters \(w1, w2, w3 and 1 more\)",
        ),
    ],
)
def test_selections_of_different_models_are_refused(combine, a, b, message):
    with pytest.raises(ValueError, match=message):
        combine(a, b)


def test_set_operations_combine_every_parameter():
    a, b = random_selection(0), random_selection(1)
    for combined, dense in [
        (a | b, torch.logical_or),
        (a & b, torch.logical_and),
        (a - b, lambda x, y: x & ~y),
    ]:
        assert list(combined) == list(a)
        for name, mask in combined.items():
            assert torch.equal(mask.to_dense(), dense(a[name].to_dense(), b[name].to_dense())), name
    assert (a | a).by_block() == a.by_block()
    assert {name: mask.kind for name, mask in (a & a).items()} == {name: mask.kind for name, mask in a.items()}
    assert not any(mask.nnz for mask in (a - a).values())
    assert (a - a)["blocks.0.norm.weight"].label == "normalisation"
    assert ((a - a) | a).overlap(a, whole=True).jaccard == 1


def test_notes_say_what_a_selection_was_made_of():
    made = random_selection(0) | (random_selection(1) - random_selection(2))
    policy = made.notes["policy"]
    assert policy.count("PerNeuron(k=2)") == 3
    assert "] or [policy [" in policy
    assert "] without [" in policy
    assert policy in str(made)


def test_only_selections_are_combined():
    with pytest.raises(TypeError, match="unsupported operand"):
        random_selection(0) | {}


def test_fingerprints_of_a_combination_are_those_that_agree():
    a = gradsel.Selection({name: Whole((2,)) for name in "xyz"}, base={"x": "1", "y": "2"})
    b = gradsel.Selection({name: Whole((2,)) for name in "xyz"}, base={"y": "3", "z": "4"})
    assert (a | b).base == {"x": "1", "z": "4"}


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
    with pytest.raises(ValueError, match="no shape is given for 1 parameters, first c"):
        gradsel.Selection.from_coo({"c": torch.tensor([[1], [2]])}, shapes)
    with pytest.raises(ValueError, match="a: indices of dimension 0 must lie in 0 to 1, found 2"):
        gradsel.Selection.from_coo({"a": torch.tensor([[2], [2]])}, shapes)
    with pytest.raises(TypeError, match="b: bits must be"):
        gradsel.Selection.from_bits({"b": torch.zeros(2)}, shapes)


class Square(nn.Module):
    """Layers in which K = 2 r entries a neuron are as many as SHiRA's r * (in + out)."""

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
    with pytest.raises(ValueError, match="has no SHiRA layers with an adapter 'other'"):
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
        (["proj"], r"proj\.weight has 32 .* exactly r \* \(in \+ out\) = 16 .* r = 1; .* of its own with r = 2"),
        (["head"], r"head\.weight has 72 selected .* no r fits it, as 72 is not a positive multiple of 27"),
        (["unseen"], r"unseen\.weight has 0 selected .* no r fits it"),
    ],
)
def test_counts_that_shira_cannot_have_are_refused(modules, message):
    model = Square()
    model.unseen = nn.Linear(4, 4)
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(4), "magnitude", freeze=["unseen.*"])
    with pytest.raises(ValueError, match=message):
        shira(selection, model, modules=modules)


def test_layers_with_other_counts_get_adapters_of_their_own():
    """4 entries a neuron are 2 * (8 + 8) of one layer, 3 * (8 + 24) of the other."""
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
    with pytest.raises(ValueError, match="not a layer of the model that shira_mask_fn"):
        mask_fn(other.head, 1)
    with pytest.raises(ValueError, match=r"the selection has no parameter 'head\.weight'"):
        selection_of(a=Whole((2,))).shira_mask_fn(model)(model.head, 1)
    with pytest.raises(ValueError, match=r"head\.weight is \[2\] in the selection, \[3, 24\] in the model"):
        selection_of(**{"head.weight": Whole((2,))}).shira_mask_fn(model)(model.head, 1)


def test_a_union_of_tasks_trains_attached():
    model = Toy()
    selection = random_selection(0) | random_selection(1)
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1)
    before = model.blocks[0].fc1.weight.detach().clone()
    cross_entropy(model, batches()[0]).backward()
    optimizer.step()
    gradsel.detach(model)
    moved = model.blocks[0].fc1.weight.detach() != before
    assert moved.any()
    assert not (moved & ~selection["blocks.0.fc1.weight"].to_dense()).any()


def test_equality_is_that_of_entries_and_kinds():
    one, same, other = (gradsel.select(Toy(), None, None, criterion=gradsel.random_scores(s)) for s in (0, 0, 1))
    assert one == same
    assert one != other
    assert one != gradsel.Selection({**one, "head.weight": Frozen((4, 12))})
    assert one != 3
