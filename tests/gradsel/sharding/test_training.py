"""Attached models under FSDP2 on two and four ranks: they train what one process trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradsel
from tests.support.selections import PARTIAL, random_selection
from tests.support.sharded import (
    OPTIMIZERS,
    batches,
    check_alike,
    check_equal,
    check_written,
    meshes,
    models,
    shard,
    shard_attached,
    share,
    whole_state,
)
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")


def train(mesh_name: str, kind: str, optimizer_name: str, attach_first: bool, options: dict | None = None) -> None:
    """Trains the toy sharded, each rank on its share of every batch, and whole on all of it."""
    mesh = meshes()[mesh_name]
    model, alone, selection = models(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard_attached(model, selection, mesh, attach_first, **(options or {}))
    gradsel.attach(alone, selection)
    optimizers = [OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(each)) for each in (model, alone)]
    for batch in batches():
        for each, optimizer, part in zip((model, alone), optimizers, (share(batch, mesh), batch), strict=True):
            optimizer.zero_grad()
            cross_entropy(each, part).backward()
            optimizer.step()
    state = whole_state(model)
    check_equal(state, alone.state_dict())
    check_alike(state)
    check_written(model)
    for name, mask in selection.items():
        frozen = ~mask.to_dense()
        assert torch.equal(state[name][frozen], before[name][frozen]), name
        assert not mask.nnz or name.startswith("tokens") or not torch.equal(state[name], before[name]), name


@pytest.mark.supports("FSDP2", "attach", "MaskedAdam")
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-shard", "shard-attach"])
@pytest.mark.parametrize("kind", PARTIAL)
def test_kinds_on_four_ranks(ranks, kind, attach_first):
    ranks.run(train, "four", kind, "MaskedAdamW", attach_first)


@pytest.mark.supports("FSDP2", "other optimizers")
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-shard", "shard-attach"])
def test_other_optimizers(ranks, attach_first, optimizer):
    ranks.run(train, "four", "per-row", optimizer, attach_first)
    ranks.run(train, "four", "rows", optimizer, attach_first)


@pytest.mark.supports("HSDP", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize("mesh", ["two", "hybrid"])
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-shard", "shard-attach"])
def test_two_ranks_and_two_replicas(ranks, attach_first, mesh):
    ranks.run(train, mesh, "per-row", "MaskedAdamW", attach_first)
    ranks.run(train, mesh, "irregular", "AdamW", attach_first)


def uneven(attach_first: bool) -> None:
    """Rows that four ranks cannot share equally: 3, 3, 3 and 1, or 2, 2, 1 and none."""
    mesh = meshes()["four"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    alone = copy.deepcopy(model)
    selection = random_selection(model)
    if attach_first:
        gradsel.attach(model, selection)
    fully_shard(model, mesh=mesh)
    if not attach_first:
        gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    optimizers = [OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)) for each in (model, alone)]
    inputs = torch.randn(8, 6, dtype=torch.float64)
    own = inputs[mesh.get_local_rank() * 2 :][:2]
    for _ in range(2):
        for each, optimizer, part in zip((model, alone), optimizers, (own, inputs), strict=True):
            optimizer.zero_grad()
            each(part).square().mean().backward()
            optimizer.step()
    check_equal(whole_state(model), alone.state_dict())
    check_written(model)
    assert {int(state["step"]) for state in optimizers[0].state.values()} == {2}


@pytest.mark.parametrize("attach_first", [True, False])
def test_rows_that_ranks_cannot_share_equally(ranks, attach_first):
    ranks.run(uneven, attach_first)


def ignored(kind: str) -> None:
    """Values that FSDP is told to ignore are plain parameters, the same on every rank."""
    mesh = meshes()["four"]
    model, alone, selection = models(kind)
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    shard(model, mesh, ignored_params={p for name, p in model.named_parameters() if name.endswith("_values")})
    optimizers = [OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)) for each in (model, alone)]
    for batch in batches():
        for each, optimizer, part in zip((model, alone), optimizers, (share(batch, mesh), batch), strict=True):
            optimizer.zero_grad()
            cross_entropy(each, part).backward()
            optimizer.step()
    check_equal(whole_state(model), alone.state_dict())
    check_written(model)


@pytest.mark.parametrize("kind", ["per-row", "irregular"])
def test_values_that_fsdp_ignores(ranks, kind):
    ranks.run(ignored, kind)


@pytest.mark.parametrize("reshard", [True, False, 2])
def test_resharding_after_forward(ranks, reshard):
    ranks.run(train, "four", "per-row", "MaskedAdamW", True, {"reshard_after_forward": reshard})
