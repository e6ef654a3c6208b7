"""Options, masks and training loops that several tests of MaskedAdam use."""

from __future__ import annotations

import copy

import torch
from torch import nn

import gradsel
from gradsel.masks import PerRow, Whole
from tests.kernels.cases import same_bits
from tests.support.toy import batches, cross_entropy

ADAM_OPTIONS = [
    {},
    {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-4},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"amsgrad": True, "maximize": True},
]

ANCHORS = [
    {"anchor": 0.125, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"anchor": 0.1, "anchor_norm": 1, "maximize": True},
    {"anchor": 10.0, "anchor_decoupled": True, "amsgrad": True},
    {"anchor": 1.0, "anchor_decoupled": True, "anchor_norm": 1, "weight_decay": 0.1},
]
#: Returns every entry whose gradient is zero to its original in one step.
RETURN = {"anchor": 1e9, "anchor_decoupled": True, "anchor_norm": 1, "betas": (0.0, 0.999)}


def selection_for(model, k=1):
    return gradsel.select(copy.deepcopy(model).eval(), batches(), cross_entropy, gradsel.PerNeuron(k))


def frozen_bits(model, selection):
    return {name: p.detach()[~selection[name].to_dense()].clone() for name, p in model.named_parameters()}


def assert_frozen(model, selection, bits):
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.detach()[~selection[name].to_dense()], bits[name]), name


def train(model, optimizer, steps=4, scheduler=None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model, batches()[step % 3])
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def random_masks(model, seed, k=2):
    """K random entries of every neuron; parameters with fewer than two dimensions are trained whole."""
    generator = torch.Generator().manual_seed(seed)

    def mask(p):
        if p.ndim < 2:
            return Whole(p.shape)
        rows, n = p.shape[0], p[0].numel()
        cols = torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(rows)])
        return PerRow(cols.to(torch.int32), p.shape)

    return gradsel.Selection({name: mask(p) for name, p in model.named_parameters()})


def masked(model, selection, **options):
    return gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)


def wide_grads(model, batch, masks=None):
    """Dense gradients of a batch, set to zero outside the masks."""
    model.zero_grad()
    cross_entropy(model, batch).backward()
    for name, p in model.named_parameters():
        if masks is not None and p.grad is not None:
            p.grad *= masks[name].to_dense()


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def one_parameter():
    return [nn.Parameter(torch.ones(2, 3))]


def named_parameter(shape=(2, 3)):
    return [("w", nn.Parameter(torch.ones(shape)))]


MASKS = gradsel.Selection({"w": PerRow(torch.zeros(2, 1, dtype=torch.int32), (2, 3))})
