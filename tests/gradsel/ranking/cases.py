"""Models and data sets that several tests of the memory modes use."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.toy import batches


def same(first, second):
    assert set(first) == set(second)
    for name in first:
        assert first[name].kind == second[name].kind, name
        assert torch.equal(first[name].to_dense(), second[name].to_dense()), name


class Wide(nn.Module):
    """Eight layers of a megabyte each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Changing:
    """Batches that differ from pass to pass."""

    def __init__(self, change):
        self.passes, self.change = 0, change

    def __iter__(self):
        self.passes += 1
        yield from self.change(batches(), self.passes)
