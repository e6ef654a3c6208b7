"""select() on DTensors chooses what one process chooses on the whole model and all data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

import gradsel
from gradsel.errors import OtherRankFailed
from tests.support.sharded import batches, meshes, models, one, shard, share
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")

CHOICES = {
    "per neuron": {"policy": gradsel.PerNeuron(3)},
    "all inputs": {"policy": gradsel.PerNeuron(100)},
    "columns in use": {"policy": gradsel.PerNeuron(2, columns=4)},
    "rows": {"policy": gradsel.Rows(2)},
    "columns": {"policy": gradsel.Columns(2)},
    "layer": {"policy": gradsel.PerLayer(0.1)},
    "net": {"policy": gradsel.Global(0.05)},
    "snip": {"policy": gradsel.PerNeuron(2), "criterion": "snip"},
    "absolute": {"policy": gradsel.PerNeuron(2), "criterion": "absolute"},
    "magnitude": {"policy": gradsel.PerNeuron(2), "criterion": "magnitude"},
    "random": {"policy": gradsel.PerNeuron(2), "criterion": "random"},
    "function": {"policy": gradsel.PerNeuron(2), "criterion": lambda weight, grad: grad / (1 + weight.abs().sum(0))},
    "passes": {"policy": gradsel.PerNeuron(2), "max_gradient_bytes": 12000},
}


def choose(mesh_name: str) -> None:
    mesh = meshes()[mesh_name]
    model, alone, _ = models()
    shard(model, mesh)
    own = [share(batch, mesh) for batch in batches()]
    for name, arguments in CHOICES.items():
        found = gradsel.select(model, own, cross_entropy, freeze=["unused.*", "tokens.*"], **arguments)
        expected = gradsel.select(
            alone, batches(), cross_entropy, freeze=["unused.*", "tokens.*"], process_group=one(), **arguments
        )
        assert found.base == expected.base
        for key, mask in expected.items():
            assert type(found[key]) is type(mask), (name, key)
            assert torch.equal(found[key].to_dense(), mask.to_dense()), (name, key)
    gradsel.attach(model, found)
    cross_entropy(model, own[0]).backward()


@pytest.mark.supports("FSDP2", "select")
@pytest.mark.supports("HSDP", "select")
@pytest.mark.parametrize("mesh", ["four", "hybrid"])
def test_fsdp(ranks, mesh):
    ranks.run(choose, mesh)


def tensor_parallel() -> None:
    """Weights by columns and by rows, in turn."""
    mesh = meshes()["four"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 9)).double()
    with torch.no_grad():
        model[0].weight[3, [1, 4]] = 0.25
        model[0].weight[5] = -0.5
    alone = copy.deepcopy(model)

    def place(name, module, mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = Replicate() if key == "bias" else Shard(0 if name == "2" else 1)
            module.register_parameter(key, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))

    distribute_module(model, mesh, place)
    for k in (1, 2, 4, 100):
        arguments = {"policy": gradsel.PerNeuron(k), "criterion": "magnitude", "head": ()}
        found = gradsel.select(model, None, None, **arguments)
        for key, mask in gradsel.select(alone, None, None, **arguments).items():
            assert torch.equal(found[key].to_dense(), mask.to_dense()), (k, key)


@pytest.mark.supports("TP", "select")
def test_columns_of_weights(ranks):
    ranks.run(tensor_parallel)


def not_finite() -> None:
    mesh = meshes()["four"]
    model, _, _ = models()
    shard(model, mesh)

    def loss(model, batch):
        return cross_entropy(model, batch) * 1e308 * 10

    with pytest.raises(ValueError, match="loss of batch 1 is inf"):
        gradsel.select(model, [share(batch, mesh) for batch in batches()], loss)
    factor = 1e308 * 10 if mesh.get_local_rank() == 1 else 1.0
    with pytest.raises((ValueError, OtherRankFailed), match=r"loss of batch 1 is inf"):
        gradsel.select(model, [share(batch, mesh) for batch in batches()], lambda *a: cross_entropy(*a) * factor)
    model.reset_iter_state()
    with torch.no_grad():
        local = model.head.weight.to_local()
        if mesh.get_local_rank() == 1:
            local[0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight head.weight is not finite \(1 of 48 entries\)"):
        gradsel.select(model, None, None, criterion="magnitude", kinds={"head": "rank"})


def test_all_ranks_refuse_what_one_of_them_finds(ranks):
    ranks.run(not_finite)
