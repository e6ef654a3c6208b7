"""A delta that holds every kind of mask."""

from __future__ import annotations

import torch

from gradsel.delta.delta import Delta
from gradsel.delta.parts import Part
from gradsel.masks import Flat, PerRow, Whole, WholeColumns, WholeRows
from gradsel.views import NeuronView
from tests.support.deltas import cols


def every_kind():
    torch.manual_seed(0)
    masks = {
        "one": PerRow(cols(6, 3000, 1), (6, 3000)),
        "few": PerRow(cols(6, 300, 10), (6, 300)),
        "many": PerRow(cols(6, 300, 100), (6, 3, 100)),
        "turned": PerRow(cols(6, 300, 1), (300, 6), NeuronView((1,))),
        "rows": WholeRows(torch.tensor([1, 4], dtype=torch.int32), (6, 5)),
        "columns": WholeColumns(torch.tensor([0, 4], dtype=torch.int32), (6, 5)),
        "some": Flat(torch.tensor([0, 7, 299]), (6, 50)),
        "bias": Whole((6,)),
        "scalar:": Whole(()),
    }
    parts = {
        name: Part(mask, torch.randn(mask.compact_shape), torch.float32, "d" * 32, "6x300 float32 0123456789abcdef")
        for name, mask in masks.items()
    }
    parts["count"] = Part(Whole(()), torch.tensor(7), torch.int64)
    half = torch.randn(6).bfloat16()
    parts["half"] = Part(Whole((6,)), half, torch.bfloat16, originals=torch.zeros_like(half))
    return Delta(parts, {"policy": "PerNeuron(k=1)", "task": "toys"})
