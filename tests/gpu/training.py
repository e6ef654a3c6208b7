"""Models, data and training loops for the GPU tests that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradsel
from tests.support.selections import check_consistent, check_frozen, frozen_entries, random_selection
from tests.support.toy import Toy, cross_entropy

Data = list[tuple[Tensor, ...]]


def moved(data: Data, device: str, dtype: torch.dtype = torch.float32) -> Data:
    return [tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in batch) for batch in data]


def toy(device: str, dtype: torch.dtype = torch.float32, kind: str = "per-row"):
    """A model without dropout or running statistics, and masks on the CPU, as a loaded selection has them."""
    torch.manual_seed(0)
    model = Toy().eval().to(device, dtype)
    return model, random_selection(model, kind, freeze=["unused.*"])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def attached(device: str, dtype: torch.dtype = torch.float32, **options):
    model, selection = toy(device, dtype)
    gradsel.attach(model, selection)
    return model, gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2, **options)


def assert_close(left: nn.Module, right: nn.Module) -> None:
    """For float64: other orders of sums, and nothing else. Adam divides gradients near zero by eps = 1e-8."""
    for (name, a), b in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-8, atol=1e-8, msg=name)


# --- Small steps, which are cheap to repeat ----------------------------------------------------------------------


class Small(nn.Module):
    """Layers of the direct route, whose steps are cheap to repeat."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(32, width), nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(nn.functional.gelu(self.first(x))))


def small(device: str, dtype: torch.dtype, **options):
    """An attached model and its optimizer."""
    torch.manual_seed(0)
    model = Small().to(device, dtype)
    selection = random_selection(model)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2, **options)
    return model, optimizer, lambda: (check_consistent(model), check_frozen(model, selection, before))


def close(left: nn.Module, right: nn.Module, tolerance: float) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


# --- The same training as with dense gradients -------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.point = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.grouped(nn.functional.gelu(self.first(x))))
        return self.head(nn.functional.gelu(self.point(x)).mean((2, 3)))
