"""How many entries a selection trains, by block and by type of layer."""

from __future__ import annotations

import math

import pytest

import gradsel
from gradsel.demo import plots
from gradsel.masks import Frozen, PerRow, Whole
from gradsel.parameters.blocks import split_names
from tests.gradsel.selection.cases import int32, random_selection, selection_of
from tests.support.toy import Toy

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
