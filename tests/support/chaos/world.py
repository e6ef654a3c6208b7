"""A small attached model to which anything may be done, and what must hold after each thing that was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import gradsel
from gradsel.attached import SUFFIX, Selected, selected_in
from tests.support.every_layer import plain_state
from tests.support.selections import KINDS, check_consistent, random_selection

DIM = 4
LAYERS = {
    "linear": lambda: nn.Linear(DIM, DIM),
    "conv1d": lambda: Conv1D(DIM, DIM),
    "line": lambda: nn.Conv1d(DIM, DIM, 3, padding="same"),
    "plane": lambda: nn.Conv2d(2, 4, (1, 3), padding=(0, 1), groups=2),
    "up": lambda: nn.ConvTranspose1d(DIM, DIM, 3, padding=1),
    "attention": lambda: nn.MultiheadAttention(DIM, 2, batch_first=True),
    "recurrent": lambda: nn.GRU(DIM, DIM, batch_first=True),
    "bilinear": lambda: nn.Bilinear(DIM, DIM, DIM),
    "read": lambda: nn.Linear(DIM, DIM),
    "experts": lambda: nn.ParameterList([nn.Parameter(torch.randn(2, DIM, DIM) / 2)]),
}
#: Layers that are called and nothing else, so that a wrapper may take their place.
CALLED = ("linear", "conv1d", "line", "up", "recurrent", "bilinear")


class OneLayer(nn.Module):
    """int tokens [batch, 4] to scores [batch, 5], by one kind of layer between an embedding and a head."""

    def __init__(self, kind: str, tied: bool) -> None:
        super().__init__()
        self.kind = kind
        self.tokens = nn.Embedding(5, DIM)
        self.layer = LAYERS[kind]()
        self.head = nn.Linear(DIM, 5, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        layer = self.layer if "layer" in self._modules else self.box.layer
        match self.kind:
            case "line" | "up":
                y = layer(x.mT).mT
            case "plane":
                y = layer(x.unflatten(1, (2, 2)))[:, :2].flatten(1, 2)
            case "attention":
                y = layer(x, x, x, need_weights=False)[0]
            case "recurrent":
                y = layer(x)[0]
            case "bilinear":
                y = layer(x, x)
            case "read":
                y = F.linear(x, layer.weight, layer.bias)
            case "experts":
                y = torch.stack([each @ layer[0][i % 2].T for i, each in enumerate(x)])
            case _:
                y = layer(x)
        return self.head(x + y).mean(1)


TOKENS = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 2], [1, 3, 3, 0]])
LABELS = torch.tensor([0, 1, 4])


#: How far results may be from torch's, in roundings of the largest entry (at least of 1): in half precision the one of
#: torch's own result, as ours are summed in float32, and one of a sum of two; in float32 sums have another order.
ROUNDINGS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8, torch.float64: 8}


class Skipped(Exception):
    """The action does not apply to this world."""


class World:
    """One attached model and what is known about it.

    Attributes:
        seed: of its model and of what is done to it.
        model: as attach() knows it.
        plain: an unattached model with the same names.
        untouched: the plain model as it was at attach(), or None if it is no longer the base.
        known: the dense state; unselected entries may only change where an action says so.
        at_attach: the names of parameters at attach(), by those of now.
        optimizer: holds the model's trainable parameters, or None.
        log: what was done, to print.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.kind = list(LAYERS)[seed % len(LAYERS)]
        self.model: nn.Module = OneLayer(self.kind, tied=self.random.random() < 0.25)
        self.log = [f"{self.kind}, tied: {self.model.head.weight is self.model.tokens.weight}"]
        self.wrapped = False
        if self.random.random() < 0.3:
            dtype = self.random.choice([torch.bfloat16, torch.float16])
            self.model.to(dtype)
            self.log.append(f"in {dtype}")
        self.attach()

    def attach(self) -> None:
        self.plain = copy.deepcopy(self.model)
        self.untouched: nn.Module | None = copy.deepcopy(self.model)
        self.at_attach = {name: name for name, _ in self.model.named_parameters()}
        mask_kind = self.random.choice(KINDS)
        self.selection = random_selection(self.model, mask_kind, k=self.random.choice([1, 2]), rank=["*"])
        self.log.append(f"attach({mask_kind})")
        self.frozen = {name: ~mask.to_dense() for name, mask in self.selection.items()}
        gradsel.attach(self.model, self.selection)
        self.optimizer: torch.optim.Optimizer | None = None
        self.know()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.tokens.weight.dtype

    def go_on_with(self, model: nn.Module) -> None:
        self.model, self.optimizer = model, None

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weight and values of what is trained in part, each once."""
        found = {id(weight): (weight, values) for weight, values, _ in self._selected()}
        return list(found.values())

    def _selected(self) -> Iterator[tuple[nn.Parameter, nn.Parameter, Selected]]:
        for module in self.model.modules():
            for short, selected in selected_in(module).items():
                yield module._parameters[short], module._parameters[short + SUFFIX], selected

    def dense(self) -> dict[str, Tensor]:
        return plain_state(self.model, self.plain)

    def know(self) -> None:
        """Takes the weights as they are now."""
        self.known = self.dense()

    def output(self, state: dict[str, Tensor] | None = None) -> Tensor:
        """Of the dense model with the values that the model has now.

        It requires the same gradients: some operators of torch round differently where none are wanted.
        """
        self.plain.load_state_dict(self.dense() if state is None else state)
        for name, p in self.plain.named_parameters():
            p.requires_grad_(self.model.get_parameter(name).requires_grad)
        self.plain.train(self.model.training)
        return self.plain(TOKENS)

    def dense_gradients(self, rows: slice | list[int] = slice(None)) -> dict[str, Tensor]:
        """Those of the dense model, all of it trained, on these rows of the batch."""
        state = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in self.dense().items()}
        output = torch.func.functional_call(self.plain, state, (TOKENS[rows],), tie_weights=False)
        self.loss(output, rows).backward()
        return {name: tensor.grad for name, tensor in state.items() if tensor.grad is not None}

    def loss(self, output: Tensor, rows: slice | list[int] = slice(None)) -> Tensor:
        return F.cross_entropy(output.double(), LABELS[rows])

    def assert_close(self, found: Tensor, expected: Tensor, name: str = "") -> None:
        """Up to some roundings of the largest entry in the dtype of the model."""
        atol = ROUNDINGS[self.dtype] * torch.finfo(self.dtype).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")

    def refuses(self, use: Callable[[], object], kind: type[Exception], words: str) -> None:
        """One documented error, and nothing has changed."""
        before = self.dense()
        with pytest.raises(kind, match=words):
            use()
        now = self.dense()
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items()), "refused, yet changed"

    def check(self, thorough: bool) -> None:
        """Forward is that of the dense model with the same values, frozen bits are unmoved, and deltas tell it all."""
        now = self.dense()
        with torch.no_grad():
            expected = self.output(now)
            found = self.model(TOKENS)
        if self.kind == "attention" and not self.model.training:  # torch's fast path takes no subclasses
            self.assert_close(found, expected)
        else:
            assert torch.equal(found, expected), "forward"
        check_consistent(self.model)
        for name, before in self.at_attach.items():
            frozen = self.frozen[before]
            assert torch.equal(now[name][frozen], self.known[name][frozen]), f"frozen bits of {name} moved"
        self.known = now
        for p in self.optimizer.state if self.optimizer is not None else ():
            for key, tensor in self.optimizer.state[p].items():
                if isinstance(tensor, Tensor):
                    assert bool(torch.isfinite(tensor.double()).all()), f"{key} of the optimizer"
                    assert key == "step" or tensor.shape == p.shape
        if thorough:
            self.check_delta(now)

    def check_delta(self, now: dict[str, Tensor]) -> None:
        delta = gradsel.Delta.of(self.model)
        base = copy.deepcopy(self.plain) if self.untouched is None else copy.deepcopy(self.untouched)
        names = {before: name for name, before in self.at_attach.items()}
        if self.untouched is None:  # other frozen weights than at attach(): those of now, with the delta's entries lost
            base = OneLayer(self.kind, self.model.head.weight is self.model.tokens.weight).to(self.dtype)
            with torch.no_grad():
                for before, p in base.named_parameters():
                    p.copy_(now[names[before]])
                    p[self.selection[before].to_dense()] = 7.0
        gradsel.load_delta(base, delta, force=self.untouched is None)
        for before, p in base.named_parameters():
            assert torch.equal(p, now[names[before]]), f"base + delta of {before}"
