"""A small network with every kind of parameter that the rules tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.gamma * self.fc2(nn.functional.gelu(self.fc1(x)))


class Toy(nn.Module):
    """[batch, 3, 8, 8] images to ``classes`` logits."""

    def __init__(self, dim: int = 12, classes: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, dim))
        self.bn = nn.BatchNorm1d(5)
        self.blocks = nn.ModuleList([Block(dim), Block(dim)])
        self.unused = nn.Linear(dim, 3)
        self.tokens = nn.Embedding(7, dim)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(dim, classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.bn(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)
        for block in self.blocks:
            x = self.dropout(block(x))
        return x[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def batches(count: int = 3, size: int = 10, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(count)
    ]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
