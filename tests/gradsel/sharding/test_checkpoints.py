"""Checkpoints and deltas of sharded models: saved on four ranks, they load on four, on two and in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import gradsel
from tests.support.sharded import (
    OPTIMIZERS,
    batches,
    check_equal,
    common_folder,
    meshes,
    models,
    one,
    shard,
    shard_attached,
    share,
    whole,
    whole_state,
)
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")


def trained(mesh_name: str | None, kind: str, optimizer_name: str, steps: int = 0):
    """The toy, attached and sharded over a mesh, or in one process, and its optimizer."""
    model, _, selection = models(kind)
    gradsel.attach(model, selection)
    mesh = None if mesh_name is None else meshes()[mesh_name]
    if mesh is not None:
        shard(model, mesh)
    optimizer = OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(model))
    step(model, optimizer, mesh, steps)
    return model, optimizer, mesh


def step(model: nn.Module, optimizer: torch.optim.Optimizer, mesh, steps: int) -> None:
    for batch in batches(count=steps):
        optimizer.zero_grad()
        cross_entropy(model, batch if mesh is None else share(batch, mesh)).backward()
        optimizer.step()


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [{key: whole(value).clone() for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
            for group in optimizer.param_groups for p in group["params"]]  # fmt: skip


def saved_and_loaded(source: str, kind: str, optimizer_name: str, places: list[str | None]) -> None:
    folder = common_folder()
    model, optimizer, mesh = trained(source, kind, optimizer_name, steps=2)
    both = get_state_dict(model, optimizer)
    dcp.save({"model": both[0], "optimizer": both[1]}, checkpoint_id=folder)
    state, expected = whole_state(model), moments(optimizer)
    for where in places:
        other, other_optimizer, other_mesh = trained(where, kind, optimizer_name)
        parts = get_state_dict(other, other_optimizer)
        into = {"model": parts[0], "optimizer": parts[1]}
        if where == "two":
            dcp.load(into, checkpoint_id=folder, process_group=other_mesh.get_group())
        else:
            dcp.load(into, checkpoint_id=folder, no_dist=where is None)
        set_state_dict(other, other_optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"])
        for name, tensor in whole_state(other).items():
            assert torch.equal(tensor, state[name]), (where, name)
        for own, saved in zip(moments(other_optimizer), expected, strict=True):
            assert own.keys() == saved.keys()
            assert all(torch.equal(own[key], saved[key]) for key in saved), where
        if where == source:
            step(other, other_optimizer, other_mesh, 2)
            step(model, optimizer, mesh, 2)
            for name, tensor in whole_state(model).items():
                assert torch.equal(whole_state(other)[name], tensor), name
    dist.barrier()


@pytest.mark.supports("DCP", "save/load", "MaskedAdam", "other optimizers")
@pytest.mark.supports("FSDP2", "save/load")
@pytest.mark.parametrize(
    ("kind", "optimizer", "places"),
    [("per-row", "MaskedAdamW", ["four", "two", None]), ("rows", "AdamW", [None])],
)
def test_saved_on_four_ranks(ranks, kind, optimizer, places):
    ranks.run(saved_and_loaded, "four", kind, optimizer, places)


@pytest.mark.supports("HSDP", "save/load")
def test_saved_on_replicas_of_shards(ranks):
    ranks.run(saved_and_loaded, "hybrid", "per-row", "MaskedAdamW", ["hybrid", "four", None])


def full_states() -> None:
    """A whole state_dict on rank 0, as for a single file, and back."""
    model, optimizer, mesh = trained("four", "per-row", "MaskedAdamW", steps=2)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, optim = get_state_dict(model, optimizer, options=options)
    other, other_optimizer, _ = trained("four", "per-row", "MaskedAdamW")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, state, options=options)
    set_optimizer_state_dict(other, other_optimizer, optim, options=options)
    for each, own in ((model, optimizer), (other, other_optimizer)):
        step(each, own, mesh, 2)
    expected = whole_state(model)
    for name, tensor in whole_state(other).items():
        assert torch.equal(tensor, expected[name]), name


def values_alone(attach_first: bool) -> None:
    """A checkpoint of what is trained, loaded into the plain weights."""
    model, _, mesh = trained("four", "per-row", "MaskedAdamW", steps=2)
    expected, folder = whole_state(model), common_folder()
    options = StateDictOptions(ignore_frozen_params=True)
    saved = get_model_state_dict(model, options=options)
    assert "blocks.0.fc1.weight_values" in saved
    assert "blocks.0.fc1.weight" not in saved
    dcp.save(saved, checkpoint_id=folder)
    other, _, selection = models("per-row")
    shard_attached(other, selection, mesh, attach_first)
    into = get_model_state_dict(other, options=options)
    dcp.load(into, checkpoint_id=folder)
    set_model_state_dict(other, into, options=StateDictOptions(strict=False))
    for name, tensor in whole_state(other).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-shard", "shard-attach"])
def test_values_without_their_weights(ranks, attach_first):
    ranks.run(values_alone, attach_first)


def test_full_state_dicts(ranks):
    ranks.run(full_states)


def other_selection() -> None:
    folder = common_folder()
    model, _, _ = trained("four", "per-row", "SGD", steps=1)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    with pytest.raises(ValueError, match="cannot be compared with a base"):
        gradsel.Delta.of(model, base=models()[0])
    plain, _, selection = models()
    masks = dict(selection)
    mask = masks["blocks.0.fc1.weight"]
    other = ((mask.cols + 1) % mask.shape[1]).sort(1).values
    masks["blocks.0.fc1.weight"] = type(mask)(other, mask.shape, mask.view)
    gradsel.attach(plain, gradsel.Selection(masks))
    shard(plain, meshes()["four"])
    state = dict(plain.state_dict())
    dcp.load(state, checkpoint_id=folder)
    with pytest.raises(RuntimeError, match=r"blocks.0.fc1.weight_values.* another selection"):
        plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"load it before fully_shard"):
        plain.load_state_dict({name: t for name, t in state.items() if not name.endswith("_values")}, strict=False)


def test_values_of_another_selection(ranks):
    ranks.run(other_selection)


def delta_of(kind: str, attach_first: bool, mesh_name: str) -> None:
    """The delta is that of one process with the same weights."""
    mesh = meshes()[mesh_name]
    model, alone, selection = models(kind)
    start = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    shard_attached(model, selection, mesh, attach_first)
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model))
    step(model, optimizer, mesh, 2)
    delta = gradsel.Delta.of(model)
    base, _, _ = models(kind)
    applied = delta.apply_(base)
    state = whole_state(model)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    applied.revert_()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, start[name]), name
    gradsel.attach(alone, selection)
    alone.load_state_dict(whole_state(model))
    expected = gradsel.Delta.of(alone)
    for name, part in expected.items():
        assert delta[name].digest == part.digest, name
        assert delta[name].fingerprint == part.fingerprint, name
        assert torch.equal(delta[name].values, part.values), name


@pytest.mark.supports("FSDP2", "delta")
@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("kind", ["per-row", "rows", "irregular"])
def test_delta(ranks, kind, attach_first):
    ranks.run(delta_of, kind, attach_first, "four")


@pytest.mark.supports("HSDP", "delta")
def test_delta_of_replicas_of_shards(ranks):
    ranks.run(delta_of, "per-row", True, "hybrid")
    ranks.run(delta_of, "irregular", False, "hybrid")


def loaded_first() -> None:
    """A checkpoint of the plain model, loaded into shards: what is chosen and trained of it, and merged."""
    folder, mesh = common_folder(), meshes()["four"]
    start, alone, _ = models()
    dcp.save(shard(start, mesh).state_dict(), checkpoint_id=folder)
    model = models()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = shard(model, mesh).state_dict()
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state)

    chosen = {"policy": gradsel.PerNeuron(2), "freeze": ["unused.*", "tokens.*"]}
    own = [share(batch, mesh) for batch in batches()]
    selection = gradsel.select(model, own, cross_entropy, **chosen)
    expected = gradsel.select(alone, batches(), cross_entropy, process_group=one(), **chosen)
    assert selection.base == expected.base
    assert all(torch.equal(selection[name].to_dense(), mask.to_dense()) for name, mask in expected.items())

    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    for each, place in ((model, mesh), (alone, None)):
        gradsel.attach(each, selection)
        step(each, OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)), place, 2)
    check_equal(whole_state(model), alone.state_dict())
    delta, state = gradsel.Delta.of(model), whole_state(model)
    with delta.applied(base := models()[0]):
        assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    for name, part in gradsel.Delta.of(alone).items():
        assert (delta[name].digest, delta[name].fingerprint) == (part.digest, part.fingerprint), name
        torch.testing.assert_close(delta[name].values, part.values, rtol=0, atol=1e-12)

    dcp.save(model.state_dict(), checkpoint_id=folder / "trained")
    merged = models()[1]
    gradsel.attach(merged, selection)
    into = merged.state_dict()
    dcp.load(into, checkpoint_id=folder / "trained", no_dist=True)
    merged.load_state_dict(into)
    for each in (gradsel.detach(merged), gradsel.detach(model)):
        plain = whole_state(each)
        assert plain.keys() == before.keys()
        for name, tensor in plain.items():
            assert torch.equal(tensor, state[name]), name
            mask = selection.get(name)
            assert mask is None or torch.equal(tensor[~mask.to_dense()], before[name][~mask.to_dense()]), name


@pytest.mark.supports("DCP", "select", "attach", "delta", "merge")
def test_loaded_into_shards_and_then_attached(ranks):
    ranks.run(loaded_first)
