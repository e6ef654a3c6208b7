"""What is left of a distributed model at the end: the plain model with the trained weights, and its delta."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradsel
from gradsel.integrations.transformers import from_pretrained, save_pretrained
from tests.support.sharded import (
    OPTIMIZERS,
    batches,
    check_equal,
    common_folder,
    meshes,
    models,
    shard,
    share,
    whole_state,
)
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")

State = dict[str, Tensor]


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def train(model: nn.Module, mesh=None, optimizer_name: str = "MaskedAdamW", count: int = 2) -> None:
    optimizer = OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(model))
    for batch in batches(count=count):
        optimizer.zero_grad()
        cross_entropy(model, batch if mesh is None else share(batch, mesh)).backward()
        optimizer.step()


def check_merged(plain: State, trained: State, alone: State, before: State, selection: gradsel.Selection) -> None:
    """The trained weights to the bit, those of one process to 1e-12, and frozen entries as they were."""
    assert plain.keys() == before.keys()
    check_equal(plain, {name: tensor for name, tensor in alone.items() if not name.endswith("_values")})
    for name, tensor in plain.items():
        assert torch.equal(tensor, trained[name]), name
        if (mask := selection.get(name)) is not None:
            frozen = ~mask.to_dense()
            assert torch.equal(tensor[frozen], before[name][frozen]), name
            assert not mask.nnz or name.startswith("tokens") or not torch.equal(tensor, before[name]), name


def replicated() -> None:
    mesh = meshes()["four"]
    model, alone, selection = models()
    del model.tokens, alone.tokens  # DistributedDataParallel wants gradients of all that is trained
    selection = gradsel.Selection({name: mask for name, mask in selection.items() if not name.startswith("tokens.")})
    before, flags = copied(model.state_dict()), {name: p.requires_grad for name, p in model.named_parameters()}
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    parallel = DistributedDataParallel(model)
    train(parallel, mesh)
    train(alone)
    trained = copied(model.state_dict())

    delta = gradsel.Delta.of(parallel)
    for name, part in gradsel.Delta.of(alone).items():
        assert (delta[name].digest, delta[name].fingerprint) == (part.digest, part.fingerprint), name
        torch.testing.assert_close(delta[name].values, part.values, rtol=0, atol=1e-12)
    base = models()[0]
    del base.tokens
    with delta.applied(base):
        assert all(torch.equal(tensor, trained[name]) for name, tensor in base.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())

    assert gradsel.detach(parallel) is parallel
    check_merged(model.state_dict(), trained, alone.state_dict(), before, selection)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    cross_entropy(parallel, share(batches()[0], mesh)).backward()
    grad = model.blocks[0].fc1.weight.grad
    assert grad is not None
    assert int(grad.count_nonzero()) > selection["blocks.0.fc1.weight"].nnz


@pytest.mark.supports("DDP", "delta", "merge")
def test_replicas(ranks):
    ranks.run(replicated)


def detached(kind: str, mesh_name: str, options: dict) -> None:
    """Shards that were attached are plain shards again, and are trained whole from there."""
    mesh = meshes()[mesh_name]
    model, alone, selection = models(kind)
    before = copied(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    shard(model, mesh, **options)
    cross_entropy(model, share(batches()[0], mesh))  # FSDP has made its gathered parameters by now
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    train(model, mesh)
    train(alone)
    trained = copied(whole_state(model))
    cross_entropy(model, share(batches()[0], mesh))  # without a backward: what is gathered stays so
    assert gradsel.detach(model) is model
    check_merged(whole_state(model), trained, alone.state_dict(), before, selection)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any("gradsel" in name for module in model.modules() for name in vars(module))
    gradsel.detach(alone)
    train(model, mesh, "SGD")
    train(alone, None, "SGD")
    check_equal(whole_state(model), alone.state_dict())
    assert not torch.equal(alone.blocks[0].fc1.weight, trained["blocks.0.fc1.weight"])

    again = copied(whole_state(model))  # and a second time
    gradsel.attach(model, selection)
    train(model, mesh)
    assert not torch.equal(whole_state(model)["head.weight"], again["head.weight"])
    gradsel.detach(model, restore=True)
    state = whole_state(model)
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


@pytest.mark.supports("FSDP2", "merge")
def test_attached_after_fully_shard(ranks):
    ranks.run(detached, "per-row", "four", {})
    ranks.run(detached, "irregular", "four", {"reshard_after_forward": False})


@pytest.mark.supports("HSDP", "merge")
def test_attached_after_fully_shard_over_replicas(ranks):
    ranks.run(detached, "per-row", "hybrid", {})


def ignored() -> None:
    """Values that FSDP was told to ignore are ours to take off."""
    mesh = meshes()["four"]
    model, alone, selection = models()
    before = copied(model.state_dict())
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    shard(model, mesh, ignored_params={p for name, p in model.named_parameters() if name.endswith("_values")})
    train(model, mesh)
    train(alone)
    trained = copied(whole_state(model))
    check_merged(whole_state(gradsel.detach(model)), trained, alone.state_dict(), before, selection)


def test_values_that_fsdp_ignores(ranks):
    ranks.run(ignored)


def refused(mesh_name: str) -> str:
    """What FSDP has taken, torch has no way to take from it. The model goes on as if nothing had been asked."""
    mesh = meshes()[mesh_name]
    model, alone, selection = models()
    for each in (model, alone):
        gradsel.attach(each, selection)
    shard(model, mesh)
    with pytest.raises(ValueError, match=r"sharded.*detach"):
        gradsel.detach(model)
    train(model, mesh)
    train(alone)
    with pytest.raises(ValueError, match=r"sharded.*detach") as error:
        gradsel.detach(model)
    check_equal(whole_state(model), alone.state_dict())
    return str(error.value)


@pytest.mark.refuses("FSDP2", "merge")
def test_attached_before_fully_shard(ranks, refusal):
    refusal.saw(ranks.run(refused, "four")[0])


@pytest.mark.refuses("HSDP", "merge")
def test_attached_before_fully_shard_over_replicas(ranks, refusal):
    refusal.saw(ranks.run(refused, "hybrid")[0])


def exported(attach_first: bool) -> None:
    """The plain model as a file and as a folder, written by the first rank."""
    mesh, folder = meshes()["four"], common_folder()
    model, alone, selection = models()
    before = copied(model.state_dict())
    steps: list[Callable] = [lambda: gradsel.attach(model, selection), lambda: shard(model, mesh)]
    for prepare in steps if attach_first else reversed(steps):
        prepare()
    gradsel.attach(alone, selection)
    train(model, mesh)
    train(alone)
    trained = copied(whole_state(model))
    gradsel.export(model, folder / "plain.safetensors")
    gradsel.export(model, folder / "shards", max_shard_size=4000)
    check_merged(load_file(folder / "plain.safetensors"), trained, alone.state_dict(), before, selection)
    index = json.loads((folder / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    read = [load_file(folder / "shards" / name) for name in sorted(set(index.values()))]
    assert len(read) > 1
    check_merged({key: t for each in read for key, t in each.items()}, trained, alone.state_dict(), before, selection)

    with torch.no_grad():
        model.blocks[0].fc1.weight_values.mul_(2)  # nobody has run a forward since
    gradsel.export(model, folder / "plain.safetensors")
    held = selection["blocks.0.fc1.weight"].gather(load_file(folder / "plain.safetensors")["blocks.0.fc1.weight"])
    assert torch.equal(held, whole_state(model)["blocks.0.fc1.weight_values"])
    error, match = (OSError, "missing") if dist.get_rank() == 0 else (RuntimeError, "the first rank has failed")
    with pytest.raises(error, match=match):
        gradsel.export(model, folder / "missing" / "plain.safetensors")


@pytest.mark.parametrize("attach_first", [True, False])
def test_exporting(ranks, attach_first):
    ranks.run(exported, attach_first)


def gpt() -> transformers.GPT2LMHeadModel:
    """With weights as [in, out], and a head that is the embedding."""
    torch.manual_seed(0)
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=12, n_positions=4, **dropout)
    return transformers.GPT2LMHeadModel(config).double()


def of_transformers() -> None:
    """Tied weights, and what is written of a state_dict that accelerate or a Trainer has gathered."""
    mesh, folder = meshes()["four"], common_folder()
    model, alone = gpt(), gpt()
    selection = gradsel.select(alone, None, None, gradsel.PerNeuron(2), "magnitude")
    tokens = torch.arange(32).view(8, 4) % 11
    own = tokens[2 * dist.get_rank() :][:2]
    gradsel.attach(model, selection)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gradsel.attach(alone, selection)
    for each, given in ((model, own), (alone, tokens)):
        optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each))
        each(given, labels=given).loss.backward()
        optimizer.step()
    expected = copied(gradsel.detach(alone).state_dict())

    delta = save_pretrained(model, folder / "both")
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert any(name.endswith("_values") for name in full)
        model.save_pretrained(folder / "given", state_dict=full)
        model.save_pretrained(folder / "checkpoint-1", state_dict=full)
    with pytest.raises(ValueError, match=r"DTensor.* on all ranks"):
        model.save_pretrained(folder / "alone")
    dist.barrier()
    for name in ("both", "given"):
        found, told = transformers.GPT2LMHeadModel.from_pretrained(
            folder / name, dtype=torch.float64, output_loading_info=True
        )
        assert not any(told.values()), told
        check_equal(found.state_dict(), expected)
    kept = load_file(folder / "checkpoint-1" / "model.safetensors")  # of a Trainer, which resumes from it
    assert {key for key in kept if key.endswith("_values")} == {
        key for key in model.state_dict() if key.endswith("_values")
    }
    again = from_pretrained(transformers.GPT2LMHeadModel, folder / "both", dtype=torch.float64)
    assert gradsel.Delta.of(again) == delta
    check_equal(gradsel.detach(again, restore=True).state_dict(), gpt().state_dict(), 0)


def test_a_model_of_transformers(ranks):
    ranks.run(of_transformers)
