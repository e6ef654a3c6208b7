"""One small model with every kind of layer, and what holds for it at any time while it is attached."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import gradsel
from gradsel.attached import SUFFIX, selected_in
from tests.support.selections import random_selection

DIM = 8


class EveryLayer(nn.Module):
    """int tokens [batch, 6] to scores [batch, 3]: layers on the direct route, on the harvest, and read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, DIM)
        self.linear = nn.Linear(DIM, DIM)
        self.conv1d = Conv1D(DIM, DIM)
        self.line = nn.Conv1d(DIM, DIM, 3, padding="same")
        self.plane = nn.Conv2d(2, 4, (1, 3), padding=(0, 1), groups=2)
        self.up = nn.ConvTranspose1d(DIM, DIM, 3, padding=1)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.recurrent = nn.GRU(DIM, DIM, batch_first=True)
        self.bilinear = nn.Bilinear(DIM, DIM, DIM)
        self.read_by_parent = nn.Linear(DIM, DIM)
        self.experts = nn.Parameter(torch.randn(3, DIM, DIM) / 3)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = x + self.conv1d(self.linear(x).tanh())
        x = x + self.line(x.mT).mT
        x = x + self.plane(x.unflatten(1, (2, 3)))[:, :2].flatten(1, 2)
        x = x + self.up(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.recurrent(x)[0]
        x = x + self.bilinear(x, x).tanh()
        x = x + F.linear(x, self.read_by_parent.weight, self.read_by_parent.bias).tanh()
        x = torch.stack([x[i] @ self.experts[i % 3].T for i in range(len(x))])
        return self.head(self.norm(x).mean(1))


#: Rules by which every kind of layer is ranked.
RULES = {"rank": ["experts", "tokens.weight"]}


def every_layer(dtype: torch.dtype = torch.float32, seed: int = 0) -> EveryLayer:
    torch.manual_seed(seed)
    return EveryLayer().to(dtype)


def inputs(seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    return F.cross_entropy(model(inputs(seed)).float(), torch.tensor([0, 1, 2, 0]))


def plain_state(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """The state of the dense model with the values of an attached one, from its parameters alone.

    Args:
        plain: an unattached model with the same names.
    """
    keys = set(plain.state_dict())
    state = {name: t.clone() for name, t in model.state_dict().items() if name in keys}
    for path, module in model.named_modules():
        for short, selected in selected_in(module).items():
            values = module._parameters[short + SUFFIX].detach()
            name = f"{path}.{short}".removeprefix(".")
            selected.mask.to(values.device).scatter_(state[name], values)
    return state


def check_forward(model: nn.Module, plain: nn.Module) -> None:
    """The forward of an attached model is that of the dense model with the same values."""
    dense = copy.deepcopy(plain).to(next(model.parameters()).dtype)
    dense.load_state_dict(plain_state(model, dense))
    dense.train(model.training)
    with torch.no_grad():
        assert torch.equal(model(inputs()), dense(inputs()))


#: Modules of :class:`EveryLayer` whose weights another one reads.
NOT_CALLED = ("read_by_parent", "attention.out_proj")


class NotRecurrent(nn.Module):
    """In the place of a recurrent layer, which torch neither compiles nor swaps."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.tanh(),)


def attached(kind: str = "per-row", dtype: torch.dtype = torch.float32):
    """An attached model, a plain one with the same weights, and the selection."""
    model = every_layer(dtype)
    plain = copy.deepcopy(model)
    selection = random_selection(model, kind, **RULES)
    gradsel.attach(model, selection)
    return model, plain, selection


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def trained_in_part(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Path, module and name in it of everything that is trained in part."""
    return [(path, module, short) for path, module in model.named_modules() for short in selected_in(module)]
