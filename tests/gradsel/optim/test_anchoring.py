"""GRFT's regular set, and a whole fine-tuning run compared with one written out in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch

import gradsel
from tests.support.toy import Toy, batches, cross_entropy


def names(groups):
    return {group["anchor"]: {name for name, _ in group["params"]} for group in groups}


def attached():
    torch.manual_seed(0)
    model = Toy().eval().double()
    data = [(images.double(), labels) for images, labels in batches()]
    selection = gradsel.select(model, data, cross_entropy, gradsel.Rows(2))
    before = copy.deepcopy(model)
    gradsel.attach(model, selection)
    return model, before, selection, data


def test_the_regular_set():
    model, *_ = attached()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = [{name for name in trained if name.startswith(f"blocks.{i}.")} for i in (0, 1)]
    always = {"patch_embed.weight_values", "patch_embed.bias", "head.weight", "head.bias"}
    assert names(gradsel.anchored_groups(model, 0.1, "all")) == {0.1: trained}
    assert names(gradsel.anchored_groups(model, 0.1, 2)) == {0.1: always | blocks[0] | blocks[1], 0.0: {"unused.bias"}}
    assert names(gradsel.anchored_groups(model, 0.1, 1)) == {0.1: always | blocks[1], 0.0: blocks[0] | {"unused.bias"}}
    assert names(gradsel.anchored_groups(model, 0.1, 0)) == {0.1: always, 0.0: trained - always}
    other_head = gradsel.anchored_groups(model, 0.1, 0, head=["unused"])
    assert names(other_head)[0.1] == {"patch_embed.weight_values", "patch_embed.bias", "unused.bias"}


@pytest.mark.parametrize("wrong", [3, -1, "some", 1.0])
def test_numbers_of_blocks_that_do_not_exist(wrong):
    model, *_ = attached()
    with pytest.raises(ValueError, match=r"last_blocks .*'all' or 0 to 2"):
        gradsel.anchored_groups(model, 0.1, wrong)


def test_nothing_to_train():
    model = Toy().requires_grad_(False)
    with pytest.raises(ValueError, match="requires gradients"):
        gradsel.anchored_groups(model, 0.1)


@pytest.mark.parametrize("norm", [2, 1])
def test_grft_from_end_to_end(norm):
    """An attached model against Alg. 1 of GRFT: rows, and a pull on the last block, patch embedding and head."""
    model, plain, selection, data = attached()
    optimizer = gradsel.MaskedAdam(gradsel.anchored_groups(model, 0.05, 1), lr=1e-2, eps=1e-3, anchor_norm=norm)
    for batch in data * 3:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()

    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    dense = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=1e-3)
    regular = [name for name in before if name.startswith(("blocks.1.", "patch_embed.", "head."))]
    for batch in data * 3:
        dense.zero_grad()
        pull = sum(
            torch.linalg.vector_norm(plain.get_parameter(name) - before[name], norm) ** norm
            for name in regular
            if not torch.equal(plain.get_parameter(name), before[name])  # the norm has no gradient there
        )
        (cross_entropy(plain, batch) + 0.05 * pull).backward()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(selection[name].to_dense())
        dense.step()
    gradsel.detach(model)
    moved = 0
    for name, parameter in model.named_parameters():
        if norm == 1 and name.endswith("qkv.bias"):
            continue  # gradients of the keys' biases are rounding noise, so the signs of their differences are too
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-6, atol=1e-8, msg=name)
        moved += int((parameter != before[name]).sum())
    assert moved > 400
