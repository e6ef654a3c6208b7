"""Blocks of models: their names, and rules that keep or skip them."""

from __future__ import annotations

import pytest
from torch import nn

from gradsel.parameters.blocks import block_names
from gradsel.parameters.rules import parameter_rules
from tests.gradsel.parameters.cases import Block, Flat, Holder, actions, with_action


class Unit(nn.Module):
    """A convolution with its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(Unit(), Unit(), Unit())


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(3, 3, 1)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))


STACKS = {
    "a flat stack": (Flat, ["blocks.0", "blocks.1", "blocks.2"]),
    "stages": (
        lambda: Holder(stages=nn.ModuleList([Stage(1), Stage(2)])),
        ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"],
    ),
    "stages that are stacks themselves": (
        lambda: Holder(layers=nn.Sequential(nn.Sequential(Block()), nn.Sequential(Block(), Block()))),
        ["layers.0.0", "layers.1.0", "layers.1.1"],
    ),
    "layers of a ResNet": (
        lambda: Holder(
            layer1=nn.Sequential(Bottleneck(), Bottleneck()), layer2=nn.Sequential(Bottleneck()), fc=nn.Linear(3, 2)
        ),
        ["layer1.0", "layer1.1", "layer2.0"],
    ),
    "a model that is a stack": (lambda: nn.Sequential(Block(), Block()), ["0", "1"]),
    "units of a plain network": (lambda: Holder(features=nn.Sequential(Unit(), Unit())), ["features.0", "features.1"]),
    "lists in a list": (
        lambda: Holder(layers=nn.ModuleList(nn.ModuleList([Block(), Unit()]) for _ in range(2))),
        ["layers.0", "layers.1"],
    ),
    "no blocks": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), []),
    "layers without parts": (lambda: Holder(layers=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])), []),
}


@pytest.mark.parametrize("name", STACKS)
def test_block_names(name):
    make, expected = STACKS[name]
    model = make()
    assert block_names(model) == expected
    for number, path in enumerate(expected):  # blocks are numbered across all stages
        inside = [full for full in actions(model) if full.startswith(f"{path}.")]
        others = [full for full in actions(model) if full not in inside]
        for wanted in (number, number - len(expected)):
            kept = parameter_rules(model, blocks=[wanted])
            assert all(kept[full].reason != "block left out" for full in inside)
            assert all(kept[full].reason in ("block left out", "head") for full in others)
            skipped = parameter_rules(model, skip_blocks=[wanted])
            assert {full for full, rule in skipped.items() if rule.reason == "block left out"} == set(inside)


def test_blocks_keep_the_head_and_nothing_else():
    model = Flat()
    ranked = [f"blocks.2.{layer}.weight" for layer in ("fc1", "fc2")]
    model.blocks[0].head = nn.Linear(3, 3)  # a head inside a block
    assert with_action(model, "rank", blocks=[-1], head=["head"]) == ranked
    whole = with_action(model, "whole", blocks=[-1], head=["head"])
    assert whole == [
        "blocks.0.head.weight",
        "blocks.0.head.bias",
        "blocks.2.fc1.bias",
        "blocks.2.fc2.bias",
        "head.weight",
        "head.bias",
    ]
    assert actions(model, skip_blocks=[0])["blocks.0.head.weight"] == "freeze"  # skipping a block skips all of it
    assert with_action(model, "rank", blocks=[]) == []
    assert with_action(model, "whole", blocks=[], head=["head"])[-2:] == ["head.weight", "head.bias"]


def test_blocks_and_skip_blocks_together_and_under_patterns():
    model = Flat()
    options = {"blocks": [0, 1], "skip_blocks": [-2], "head": ["head"]}
    assert with_action(model, "rank", **options) == ["blocks.0.fc1.weight", "blocks.0.fc2.weight"]
    found = actions(model, **options, rank=["blocks.1.fc1.*"], whole=["stem.*"], freeze=["blocks.0.fc2.*", "head.bias"])
    assert [name for name, action in found.items() if action == "rank"] == [
        "blocks.0.fc1.weight",
        "blocks.1.fc1.weight",
        "blocks.1.fc1.bias",
    ]
    assert [name for name, action in found.items() if action == "whole"] == [
        "stem.weight",
        "stem.bias",
        "blocks.0.fc1.bias",
        "head.weight",
    ]
    assert parameter_rules(model, **options, rank=["blocks.1.*"])["blocks.1.fc1.bias"].named


@pytest.mark.parametrize("argument", ["blocks", "skip_blocks"])
@pytest.mark.parametrize("number", [3, -4])
def test_blocks_that_are_not_there(argument, number):
    with pytest.raises(ValueError, match=rf"{argument} .*block {number}\b.*Flat .*3 blocks"):
        parameter_rules(Flat(), **{argument: [0, number]})
    with pytest.raises(ValueError, match=rf"{argument} .*block 0.*Linear"):
        parameter_rules(nn.Linear(2, 2), **{argument: [0]})
