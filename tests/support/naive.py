"""A naive selection: dense gradients, sorted layer by layer, without the library's views."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradsel
from gradsel.parameters.rules import parameter_rules
from tests.support.families import Family


def by_hand(module: nn.Module, short: str, tensor: Tensor) -> Tensor:
    """The tensor as one row per neuron, written out for every layout."""
    kind = type(module).__name__
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return tensor.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    if kind == "Conv1D":
        return tensor.t()
    if kind == "DbrxExpertGLU" and short == "w2":
        return tensor.unflatten(0, (module.moe_num_experts, -1)).mT.flatten(0, 1)
    if kind in ("GptOssExperts", "Llama4TextExperts", "GroupedLinearLayer"):
        return tensor.mT.flatten(0, 1)
    if kind == "MixtralExperts":
        return tensor.flatten(0, 1)
    return tensor.flatten(1)


FRACTION = 0.01


class Naive:
    """Masks from dense gradients, by stable sorts of the matrices of :func:`by_hand`."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, int], Tensor], batches: list[int]) -> None:
        model = copy.deepcopy(model)
        for batch in batches:
            loss(model, batch).backward()
        self.scores: dict[str, Tensor] = {}
        self.cells: dict[str, Tensor] = {}  # for each cell of the matrix, the index of its entry in the parameter
        self.shapes: dict[str, torch.Size] = {}
        self.total = 0
        for full, rule in parameter_rules(model).items():
            if rule.action != "rank":
                continue
            path, _, short = full.rpartition(".")
            module, parameter = model.get_submodule(path), model.get_parameter(full)
            self.total += parameter.numel()
            if parameter.grad is not None:
                self.shapes[full] = parameter.shape
                self.cells[full] = by_hand(module, short, torch.arange(parameter.numel()).view(parameter.shape))
                self.scores[full] = by_hand(module, short, parameter.grad).abs()

    def _dense(self, full: str, chosen: Tensor) -> Tensor:
        dense = torch.zeros(self.shapes[full], dtype=torch.bool)
        dense.view(-1)[self.cells[full][chosen]] = True
        return dense

    def per_neuron(self, k: int) -> dict[str, Tensor]:
        masks = {}
        for full, score in self.scores.items():
            order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
            masks[full] = self._dense(full, torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True))
        return masks

    def lines(self, dim: int, k: int) -> dict[str, Tensor]:
        """The whole rows (``dim`` 0) or columns (1) with the largest sums of squares."""
        masks = {}
        for full, score in self.scores.items():
            best = score.square().sum(1 - dim).argsort(descending=True, stable=True)[:k]
            chosen = torch.zeros_like(score, dtype=torch.bool)
            chosen.index_fill_(dim, best, True)
            masks[full] = self._dense(full, chosen)
        return masks

    def together(self, fraction: float) -> dict[str, Tensor]:
        everything = torch.cat([score.reshape(-1) for score in self.scores.values()])
        chosen = torch.zeros_like(everything, dtype=torch.bool)
        chosen[everything.argsort(descending=True, stable=True)[: round(fraction * self.total)]] = True
        parts = chosen.split([score.numel() for score in self.scores.values()])
        return {
            full: self._dense(full, part.view(score.shape))
            for (full, score), part in zip(self.scores.items(), parts, strict=True)
        }

    @property
    def silent(self) -> int:
        return sum(int((score.amax(1) == 0).sum()) for score in self.scores.values())


POLICIES = {
    "PerNeuron": (gradsel.PerNeuron(2), lambda naive: naive.per_neuron(2)),
    "Rows": (gradsel.Rows(2), lambda naive: naive.lines(0, 2)),
    "Columns": (gradsel.Columns(2), lambda naive: naive.lines(1, 2)),
    "Global": (gradsel.Global(fraction=FRACTION), lambda naive: naive.together(FRACTION)),
}


def select(model: nn.Module, batches: list[int], family: Family, policy: gradsel.Policy, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*neurons score zero")  # counted below
        return gradsel.select(model, batches, family.loss, policy, **options)
