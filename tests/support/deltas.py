"""Models trained for a delta, deltas of a few numbers, and comparisons of models to the bit."""

from __future__ import annotations

import copy

import torch
from torch import nn

import gradsel
from gradsel.delta.delta import Delta
from gradsel.delta.parts import same_bits
from gradsel.masks import Flat, PerRow, Whole, WholeColumns
from gradsel.views import NeuronView
from tests.support.selections import data, toy
from tests.support.toy import cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def train(model, steps=2, seed=0, lr=0.05):
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=lr)
    model.eval()  # no dropout and no running statistics, so that two runs are equal
    for images, labels in data(count=steps + seed)[seed:]:
        optimizer.zero_grad()
        cross_entropy(model, (images.to(next(model.parameters()).dtype), labels)).backward()
        optimizer.step()
    return model


def trained(kind="per-row", dtype=torch.float32, seed=0):
    """A base, a selection, and an attached copy of the base trained on that selection."""
    base, selection = toy(kind, dtype)
    base.eval()
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    return base, selection, train(model, seed=seed)


def frozen_copy(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert same_bits(found[name], tensor), name


def plain(model):
    return gradsel.detach(copy.deepcopy(model))


class Odd(nn.Module):
    """Weights whose rows are not the first dimension, and other memory formats."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 8))
        self.b = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
        self.c = nn.Parameter(torch.randn(8, 6).t())
        self.d = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
        self.e = nn.Parameter(torch.randn(9, 9))


def odd_selection():
    def cols(rows, n, k=2):
        return torch.rand(rows, n).topk(k, 1).indices.sort(1).values.to(torch.int32)

    return gradsel.Selection(
        {
            "a": PerRow(cols(8, 6), (6, 8), NeuronView((1,))),
            "b": PerRow(cols(8, 18), (8, 4, 3, 3), NeuronView((0, 2), groups=2)),
            "c": Flat(torch.tensor([0, 5, 40]), (6, 8)),
            "d": Whole((4, 3, 3, 3)),
            "e": WholeColumns(torch.tensor([0, 7], dtype=torch.int32), (9, 9), NeuronView((1,))),
        }
    )


def delta_of(**tensors):
    """A delta of 2x4 zeros that sets the given entries to the given values, and its base."""
    base, tuned = nn.Module(), nn.Module()
    masks = {}
    for name, entries in tensors.items():
        base.register_parameter(name, nn.Parameter(torch.zeros(2, 4)))
        tuned.register_parameter(name, nn.Parameter(torch.zeros(2, 4)))
        masks[name] = Flat(torch.tensor(sorted(entries)), (2, 4))
        for entry, value in entries.items():
            tuned.get_parameter(name).data.view(-1)[entry] = value
    return Delta.of(tuned, selection=gradsel.Selection(masks), base=base), base


def cols(rows, n, k):
    generator = torch.Generator().manual_seed(n)
    return torch.rand(rows, n, generator=generator).topk(k, 1).indices.sort(1).values.to(torch.int32)
