"""What a rank holds of a selection: column indices once, and originals of its own rows where it knows no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradsel
from gradsel.attached import Selected, selected_in
from gradsel.masks import PerRow
from tests.support.selections import random_selection
from tests.support.sharded import OPTIMIZERS, check_equal, meshes, whole_state

pytestmark = pytest.mark.xdist_group("ranks")

INPUTS = 64


def tensors_in(held: Any) -> Iterator[Tensor]:
    """Tensors that an object holds, in what it is made of."""
    if isinstance(held, Tensor):
        yield getattr(held, "_local_tensor", held)
    elif isinstance(held, (list, tuple, dict)):
        for each in held.values() if isinstance(held, dict) else held:
            yield from tensors_in(each)
    elif type(held).__module__.startswith("gradsel"):
        yield from tensors_in(vars(held))


def numbers(selected: Selected) -> int:
    """Numbers of integer type that a rank holds for a weight, whichever objects share them."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size()
             for t in tensors_in(selected) if not t.is_floating_point() and t.numel()}  # fmt: skip
    return sum(found.values())


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.GELU(), nn.Linear(INPUTS, INPUTS)).double()


def held(order: str, few: bool) -> None:
    """An MLP, attached (a), sharded by FSDP (s) or parallel (p), of which few columns, or all, are used."""
    model, alone, base = (mlp() for _ in range(3))
    selection = dict(random_selection(model, k=4, head=()))
    if few:
        cols = torch.tensor([3, 8, 20, 63], dtype=torch.int32).expand(INPUTS, 4)
        selection |= {name: PerRow(cols, mask.shape) for name, mask in selection.items() if name.endswith("weight")}
    mesh, start = meshes()["four"], {name: tensor.clone() for name, tensor in base.state_dict().items()}
    steps = {
        "a": lambda: gradsel.attach(model, gradsel.Selection(selection)),
        "s": lambda: fully_shard(model, mesh=mesh),
        "p": lambda: parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}),
    }
    for letter in order:
        steps[letter]()
    gradsel.attach(alone, gradsel.Selection(selection))
    inputs = torch.randn(8, INPUTS, dtype=torch.float64)
    own = inputs[2 * mesh.get_local_rank() :][:2] if "s" in order else inputs
    for each, given in ((model, own), (alone, inputs)):
        optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each))
        optimizer.param_groups[0]["anchor"] = 0.1  # pulls to the originals
        for _ in range(2):
            optimizer.zero_grad()
            each(given).square().mean().backward()
            optimizer.step()
    check_equal(whole_state(model), alone.state_dict())

    tables = INPUTS + 4 if few else 0  # positions of all columns, and the used ones
    for each, name in ((model[0], "0.weight"), (model[2], "2.weight")):
        (selected,) = selected_in(each).values()
        by_rows = name == "0.weight" or "s" in order
        if by_rows:
            assert selected.mask.nnz <= numbers(selected) <= selected.mask.nnz + 2 * tables
        first_attached = order.index("a") < max(order.find("s"), order.find("p"))
        kept = getattr(selected.entries, "_local_tensor", selected.entries)
        shards = 1 if first_attached or not by_rows else 4
        assert kept.numel() == kept.untyped_storage().nbytes() // 8 == selected.mask.nnz // shards
    state = whole_state(model)
    with gradsel.Delta.of(model).applied(base):  # which checks that it is the base
        assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    if order != "as":
        state = whole_state(gradsel.detach(model, restore=True))
        assert all(torch.equal(tensor, state[name]) for name, tensor in start.items())


@pytest.mark.parametrize("few", [False, True], ids=["all columns", "few columns"])
@pytest.mark.parametrize("order", ["as", "sa", "pa"])
def test_indices_are_held_once(ranks, order, few):
    ranks.run(held, order, few)
