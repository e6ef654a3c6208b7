"""FSDP2 over quantised models: 4-bit weights are sharded like others, and those that cannot be are ignored."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import gradsel
from gradsel.masks import from_dense
from tests.support.quantised import batch, loss, quantised_net
from tests.support.sharded import OPTIMIZERS, meshes, one, whole

pytestmark = pytest.mark.xdist_group("ranks")

WEIGHTS = ("up.weight", "down.weight")


def nets(format: str, count: int) -> tuple[list[torch.nn.Module], gradsel.Selection]:
    """Equal models, and what is selected of one of them in one process."""
    made = [quantised_net(format) for _ in range(count)]
    chosen = gradsel.select(made[0], [batch()], loss, gradsel.PerNeuron(2), process_group=one())
    return made, chosen


def trained(format: str, sharded: bool) -> None:
    mesh = meshes()["four"]
    (model, alone, base, other), selection = nets(format, 4)
    for each in (model, alone):
        gradsel.attach(each, selection)
    ignored = set() if sharded else {model.get_parameter(name) for name in WEIGHTS}
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    optimizers = [OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)) for each in (model, alone)]
    own = slice(6 * mesh.get_local_rank(), 6 * mesh.get_local_rank() + 6)
    for number in range(3):
        x, y = batch(number)
        for each, optimizer, part in ((model, optimizers[0], own), (alone, optimizers[1], slice(24))):
            optimizer.zero_grad()
            loss(each, (x[part], y[part])).backward()
            optimizer.step()
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(whole(model.get_parameter(name)), parameter, rtol=0, atol=1e-6)
            assert not name.endswith("_values") or parameter.any()
    deltas = [gradsel.Delta.of(each) for each in (model, alone)]
    with deltas[0].applied(base), deltas[1].applied(other), torch.no_grad():
        torch.testing.assert_close(base(x), other(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"is sharded.*gradsel.Delta.of\(model\)"):
        gradsel.merge(model, torch.float32)


@pytest.mark.parametrize("format", ["nf4 nested", "nf4 in bfloat16", "hqq int4"])
def test_sharded(ranks, format):
    quantised_net(format)  # skips the test without the library
    ranks.run(trained, format, True)


@pytest.mark.parametrize("format", ["int8", "torchao int8", "torchao int4", "torchao float8", "quanto int8"])
def test_ignored(ranks, format):
    quantised_net(format)  # skips the test without the library
    ranks.run(trained, format, False)


def other_masks() -> None:
    (model,), selection = nets("nf4", 1)
    if meshes()["four"].get_local_rank() == 2:
        other = selection["up.weight"].to_dense().roll(1, 1)
        selection = gradsel.Selection(dict(selection) | {"up.weight": from_dense(other)}, base=selection.base)
    gradsel.attach(model, selection)
    with pytest.raises(RuntimeError, match=r"1 parameters differ, first up.weight"):
        fully_shard(model, mesh=meshes()["four"])


def test_ranks_with_different_masks(ranks):
    quantised_net("nf4")
    ranks.run(other_masks)


def late() -> None:
    """Sharded or ignored, they cannot be attached after fully_shard()."""
    mesh = meshes()["four"]
    (model, ignoring), selection = nets("nf4", 2)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"up.weight: it is quantised and sharded. Select on the model before"):
        gradsel.select(model, [batch()], loss)
    with pytest.raises(ValueError, match=r"up.weight is quantised and a DTensor already: attach\(\) before"):
        gradsel.attach(model, selection)
    fully_shard(ignoring, mesh=mesh, ignored_params={ignoring.get_parameter(name) for name in WEIGHTS})
    with pytest.raises(ValueError, match=r"up.weight is no part of what FSDP shards.*attach\(\) before"):
        gradsel.attach(ignoring, selection)
    assert not any(map(gradsel.attached.is_attached, (model, ignoring)))


def test_attaching_too_late(ranks):
    quantised_net("nf4")
    ranks.run(late)
