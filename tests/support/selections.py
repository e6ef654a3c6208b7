"""Models with random selections, and what has to hold for them while and after they train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradsel
from gradsel.attached import selected_in
from gradsel.masks import Flat, Frozen, Mask, PerRow, Whole, WholeColumns, WholeRows
from gradsel.parameters.rules import parameter_rules
from tests.support.toy import Toy, batches

SEED = 3


def random_selection(model: nn.Module, kind: str = "per-row", k: int = 2, **rules) -> gradsel.Selection:
    """Every ranked parameter gets a random mask of one kind."""
    generator = torch.Generator().manual_seed(SEED)
    masks: dict[str, Mask] = {}
    parameters = dict(model.named_parameters())
    for name, rule in parameter_rules(model, **rules).items():
        shape = tuple(parameters[name].shape)
        if rule.action == "whole":
            masks[name] = Whole(shape)
        elif rule.action == "freeze":
            masks[name] = Frozen(shape, rule.reason)
        else:
            rows, n = rule.view.shape(shape)
            few = torch.randperm(n, generator=generator)[:k].sort().values.to(torch.int32)
            if kind == "per-row":
                cols = torch.rand(rows, n, generator=generator).topk(min(k, n)).indices.sort(1).values
                masks[name] = PerRow(cols.to(torch.int32), shape, rule.view)
            elif kind == "rows":
                picked = torch.randperm(rows, generator=generator)[:k].sort().values.to(torch.int32)
                masks[name] = WholeRows(picked, shape, rule.view)
            elif kind == "columns":
                masks[name] = WholeColumns(few, shape, rule.view)
            elif kind == "irregular":
                masks[name] = Flat.from_dense(torch.rand(shape, generator=generator) < 0.1)
            else:
                masks[name] = Whole(shape)
    return gradsel.Selection(masks)


KINDS = ["per-row", "rows", "columns", "irregular", "whole"]
PARTIAL = [kind for kind in KINDS if kind != "whole"]


def mask_gradients(model: nn.Module, selection: gradsel.Selection) -> None:
    """Multiplies dense gradients by dense masks, as published code does."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(selection[name].to_dense())


def frozen_entries(model: nn.Module, selection: gradsel.Selection) -> dict[str, Tensor]:
    own = {name: p for name, p in model.named_parameters() if not name.endswith("_values")}
    return {name: p.detach()[~selection[name].to_dense()].clone() for name, p in own.items()}


def check_frozen(model: nn.Module, selection: gradsel.Selection, before: dict[str, Tensor]) -> None:
    for name, entries in frozen_entries(model, selection).items():
        assert torch.equal(entries, before[name]), name


def check_consistent(model: nn.Module) -> None:
    """Every weight holds its values."""
    for module in model.modules():
        for name, selected in selected_in(module).items():
            weight, values = module._parameters[name], module._parameters[name + "_values"]
            assert torch.equal(selected.mask.gather(weight), values.to(weight.dtype)), selected.name


def toy(kind: str = "per-row", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = Toy().to(dtype)
    return model, random_selection(model, kind, freeze=["unused.*"])


def data(dtype: torch.dtype = torch.float32, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images.to(dtype), labels) for images, labels in batches(count)]
