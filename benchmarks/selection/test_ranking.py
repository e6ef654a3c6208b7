"""Ranking all of ViT-B/16's gradients: what select() does after its last batch, against the usual ways in NumPy."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

import gradsel
from gradsel.papers.vit import vit_base_patch16_224
from gradsel.parameters.rules import parameter_rules
from gradsel.ranking.criteria import criterion_of
from gradsel.ranking.policies import Policy
from gradsel.ranking.selecting import Ranker

OTHERS: list[Policy] = [
    gradsel.Rows(3),
    gradsel.Columns(3),
    gradsel.PerLayer(fraction=0.001),
    gradsel.Global(fraction=0.001),
    gradsel.PerNeuron(1, columns=32),
]


@pytest.fixture(scope="module")
def ranked():
    """The rules, the parameters and random gradients of ViT-B/16; a tenth of the columns have larger ones."""
    torch.manual_seed(0)
    model = vit_base_patch16_224(num_classes=10)
    rules = parameter_rules(model)
    parameters = {name: p for name, p in model.named_parameters() if rules[name].action == "rank"}
    grads = {}
    for name, parameter in parameters.items():
        grad = torch.randn_like(parameter).flatten(1)
        grads[name] = grad.mul_(1 + 3 * (torch.rand(grad.shape[1]) < 0.1)).view_as(parameter)
    return rules, parameters, grads


def by_argsort(grads: dict[str, Tensor]) -> list[numpy.ndarray]:
    """As published: every row is sorted whole, whatever K is."""
    rows = (numpy.abs(grad.numpy().reshape(len(grad), -1)) for grad in grads.values())
    return [numpy.argsort(row, axis=1)[:, -1:] for row in rows]


def by_argpartition(grads: dict[str, Tensor], k: int) -> list[numpy.ndarray]:
    rows = (numpy.abs(grad.numpy().reshape(len(grad), -1)) for grad in grads.values())
    return [numpy.argpartition(row, -k, axis=1)[:, -k:] for row in rows]


def by_topk(grads: dict[str, Tensor], k: int) -> list[Tensor]:
    return [grad.flatten(1).abs().topk(k, 1).indices for grad in grads.values()]


@pytest.fixture(scope="module")
def rank(ranked):
    """What select() does after its last batch, by policy."""
    rules, parameters, grads = ranked

    def run(policy: Policy) -> dict[str, gradsel.masks.Mask]:
        ranker = Ranker(policy, criterion_of("gradient"), rules, parameters, loss_scale=1.0)
        for name, grad in grads.items():
            ranker.add(name, grad)
        return ranker.masks()

    return run


def test_per_neuron(contest, ranked, rank):
    *_, grads = ranked
    read = sum(grad.nbytes for grad in grads.values())
    contenders = {0: {"argsort": (lambda: by_argsort(grads), read)}}
    for k in (1, 5, 10):
        policy = gradsel.PerNeuron(k)
        masks = rank(policy)
        for name, columns in zip(grads, by_topk(grads, k), strict=True):
            assert torch.equal(masks[name].cols.long(), columns.sort(1).values), name
        contenders[k] = {
            "argpartition": (lambda k=k: by_argpartition(grads, k), read),
            "topk": (lambda k=k: by_topk(grads, k), read),
            "native": (lambda policy=policy: rank(policy), read),
        }
    contest("ranking", "ViT-B/16, PerNeuron", "float32", contenders)


@pytest.mark.parametrize("policy", OTHERS, ids=str)
def test_other_policies(contest, ranked, rank, policy):
    *_, grads = ranked
    read = sum(grad.nbytes for grad in grads.values())
    contest(
        "ranking", f"ViT-B/16, {policy}", "float32", {getattr(policy, "k", 0): {"native": (lambda: rank(policy), read)}}
    )
