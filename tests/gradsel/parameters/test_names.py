"""Names of parameters that are shared, wrapped or unusual."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from gradsel.parameters.blocks import block_names
from gradsel.parameters.names import strip_wrappers
from gradsel.parameters.rules import parameter_rules
from tests.gradsel.parameters.cases import Block, Flat, Holder, actions, with_action, wrapped


def test_wrapper_names():
    assert strip_wrappers("module._orig_mod.blocks.0.module.weight") == "blocks.0.module.weight"
    assert strip_wrappers("blocks.0._orig_mod.fc.weight") == "blocks.0.fc.weight"


def test_shared_parameters_belong_to_all_their_blocks():
    model = Flat()
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    assert "blocks.1.fc1.weight" not in parameter_rules(model)
    assert actions(model, blocks=[0])["blocks.0.fc1.weight"] == "rank"
    assert actions(model, blocks=[1])["blocks.0.fc1.weight"] == "rank"
    assert actions(model, blocks=[2])["blocks.0.fc1.weight"] == "freeze"
    assert actions(model, skip_blocks=[1])["blocks.0.fc1.weight"] == "freeze"  # training it would change block 1
    assert actions(model, whole=["blocks.1.fc1.weight"])["blocks.0.fc1.weight"] == "whole"


def test_shared_modules_are_one_block():
    block = Block()
    model = Holder(layers=nn.ModuleList([block, block, Block()]))
    assert block_names(model) == ["layers.0", "layers.2"]
    assert len(with_action(model, "rank")) == 4
    assert actions(model, freeze=["layers.1.*"])["layers.0.fc1.weight"] == "freeze"


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_orig_mod+module", "module+_orig_mod", "checkpoint"])
def test_rules_do_not_depend_on_wrappers(name):
    plain, model = Flat(), wrapped(Flat(), name)
    options = {"blocks": [-1], "freeze": ["blocks.2.fc2.*"], "head": ["head"]}
    assert parameter_rules(model, **options) == parameter_rules(plain, **options)
    model = Flat()
    model.blocks[2] = wrapped(model.blocks[2], "checkpoint" if name == "checkpoint" else "_orig_mod")
    assert set(parameter_rules(model)) == set(parameter_rules(plain))


def test_a_compiled_model_has_the_rules_of_the_plain_one():
    model = Flat()
    assert parameter_rules(torch.compile(model), skip_blocks=[1]) == parameter_rules(model, skip_blocks=[1])


class Talking(nn.Module):
    """A language model that names its output embedding, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder


def test_the_output_embedding_is_found_inside_wrappers():
    for model in (Talking(), wrapped(Talking(), "module"), Holder(language_model=Talking())):
        reasons = {name.removeprefix("language_model."): r.reason for name, r in parameter_rules(model).items()}
        assert reasons == {
            "dense.weight": "weight",
            "dense.bias": "bias",
            "decoder.weight": "output embedding",
            "decoder.bias": "bias",
        }


def test_names_that_wrappers_would_make_equal_are_refused():
    model = Holder(module=nn.Linear(3, 3), weight=nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"module\.weight .*Holder"):
        parameter_rules(model)


def test_exotic_names():
    model = nn.Module()
    for name in ("with space", "brackets[0]", "ünïcode", "bias", "weight", "0"):
        model.register_module(name, nn.Linear(2, 2))
    rules = parameter_rules(model, freeze=["brackets[[]0].*"], whole=["with space.weight"])
    assert list(rules) == [name for name, _ in model.named_parameters()]
    assert rules["brackets[0].weight"].action == "freeze"
    assert rules["with space.weight"].action == "whole"
    assert rules["bias.weight"].action == rules["weight.weight"].action == rules["0.weight"].action == "rank"
    assert rules["weight.bias"].action == "whole"
    assert strip_wrappers("encoder.module.weight") == "encoder.module.weight"  # only a wrapper's comes first


def test_empty_and_complex_parameters_have_a_rule():
    model = Holder(
        none=nn.Linear(0, 3, bias=False),
        waves=nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64)),
        linear=nn.Linear(2, 2),
    )
    rules = parameter_rules(model)
    assert (rules["waves"].action, rules["waves"].reason) == ("freeze", "complex64")
    selection = gradsel.select(model, None, None, criterion="magnitude")
    assert selection["none.weight"].nnz == 0
    assert selection["linear.weight"].nnz == 2
