"""Selections that several tests use."""

from __future__ import annotations

import torch

import gradsel
from tests.support.toy import Toy


def random_selection(seed, k=2):
    return gradsel.select(Toy(), None, None, gradsel.PerNeuron(k), gradsel.random_scores(seed=seed))


def selection_of(**masks):
    return gradsel.Selection(masks)


def int32(*rows):
    return torch.tensor(rows, dtype=torch.int32)
