"""Inputs and parameters that are not plain, dense tensors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.parallel
from torch import nn

import gradsel
from tests.support.every_layer import (
    RULES,
    every_layer,
    train,
)
from tests.support.selections import KINDS, random_selection


@pytest.mark.parametrize("layout", ["jagged", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_jagged_and_sparse_inputs(kind: str, layout: str) -> None:
    torch.manual_seed(0)
    dense, model = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    model.load_state_dict(dense.state_dict())
    selection = random_selection(model, kind, rank=["weight"])
    gradsel.attach(model, selection)
    if layout == "jagged":
        parts = [torch.randn(3, 6).double(), torch.randn(5, 6).double()]
        x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    else:
        x = torch.randn(4, 6).double().relu().to_sparse()
    for each in (model, dense):
        output = each(x)
        (output.values() if layout == "jagged" else output).square().sum().backward()
    trained = model.weight if kind == "whole" else model.weight_values
    torch.testing.assert_close(trained.grad, selection["weight"].gather(dense.weight.grad).view_as(trained))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_parameters(kind: str) -> None:
    """Selected, attached, trained and saved as contiguous ones are."""
    results = []
    for strided in (False, True):
        model = every_layer(torch.float64)
        if strided:
            for module in model.modules():
                for short, p in list(module._parameters.items()):
                    if p is not None and p.ndim > 1 and not isinstance(module, nn.GRU):
                        wide = torch.stack([p.detach(), torch.zeros_like(p)], -1)
                        setattr(module, short, nn.Parameter(wide[..., 0]))
                        assert not module._parameters[short].is_contiguous()
        plain = copy.deepcopy(model)
        selection = random_selection(model, kind, **RULES)
        gradsel.attach(model, selection)
        train(model, 3)
        gradsel.load_delta(plain, gradsel.Delta.of(model))
        for name, p in plain.named_parameters():
            assert torch.equal(p, model.get_parameter(name)), name
        results.append(gradsel.Delta.of(model))
    for name, part in results[0].items():
        torch.testing.assert_close(part.values, results[1][name].values)


class Quantised(nn.Linear):
    """A layer as bitsandbytes stores it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.ones(8, 8, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantised_weights_are_refused_unless_frozen_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(Quantised(dtype), nn.Linear(8, 4))
    batch = (torch.randn(3, 8), torch.tensor([0, 1, 3]))

    def cross_entropy(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"0\.weight"):
        gradsel.select(model, [batch], cross_entropy, gradsel.PerNeuron(2), rank=["1.weight"])
    selection = gradsel.select(
        model, [batch], cross_entropy, gradsel.PerNeuron(2), rank=["1.weight"], freeze=["0.weight"]
    )
    gradsel.attach(model, selection)
    assert gradsel.trainable_parameters(model)
