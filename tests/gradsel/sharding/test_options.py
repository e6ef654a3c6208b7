"""What FSDP2 can be told to do, with attached models; each as in one process."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import gradsel
from gradsel.masks import from_dense
from tests.support.sharded import (
    OPTIMIZERS,
    batches,
    check_alike,
    check_equal,
    check_written,
    common_folder,
    meshes,
    models,
    shard,
    shard_attached,
    share,
    whole,
    whole_state,
)
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")


def attached(kind: str = "per-row", optimizer: str = "MaskedAdamW", attach_first: bool = True, **options):
    """The sharded model and its twin in one process, both attached, and their optimizers."""
    mesh = meshes()["four"]
    model, alone, selection = models(kind)
    shard_attached(model, selection, mesh, attach_first, **options)
    gradsel.attach(alone, selection)
    both = model, alone
    return mesh, both, [OPTIMIZERS[optimizer](gradsel.trainable_parameters(each)) for each in both]


def check(model, alone) -> None:
    state = whole_state(model)
    check_equal(state, alone.state_dict())
    check_alike(state)
    check_written(model)


def clipped(own_function: bool) -> None:
    mesh, both, optimizers = attached()
    for batch in batches():
        norms = []
        for each, optimizer, part in zip(both, optimizers, (share(batch, mesh), batch), strict=True):
            optimizer.zero_grad()
            cross_entropy(each, part).backward()
            if own_function:
                norms.append(optimizer.clip_grad_norm_(0.05))
            else:
                norms.append(torch.nn.utils.clip_grad_norm_(gradsel.trainable_parameters(each), 0.05))
            optimizer.step()
        assert norms[1] > 0.05
        torch.testing.assert_close(whole(norms[0]), norms[1], rtol=1e-12, atol=0)
    check(*both)


@pytest.mark.parametrize("own_function", [False, True], ids=["torch", "MaskedAdam"])
def test_clipping(ranks, own_function):
    ranks.run(clipped, own_function)


def accumulated() -> None:
    """Three batches a step, of which only the last is reduced."""
    mesh, (model, alone), optimizers = attached()
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for number, batch in enumerate(batches()):
            model.set_requires_gradient_sync(number == 2)
            (cross_entropy(model, share(batch, mesh)) / 3).backward()
            (cross_entropy(alone, batch) / 3).backward()
        for optimizer in optimizers:
            optimizer.step()
    check(model, alone)


def test_accumulation(ranks):
    ranks.run(accumulated)


def offloaded(optimizer: str, attach_first: bool) -> None:
    """Trained, saved, loaded and trained on; the delta, and the plain model at the end."""
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    mesh, both, optimizers = attached("per-row", optimizer, attach_first, **policy)
    model, alone = both
    before = {name: tensor.clone() for name, tensor in models()[0].state_dict().items()}
    steps(mesh, both, optimizers)
    check(*both)

    folder = common_folder()
    parts = get_state_dict(model, optimizers[0])
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
    _, (model, _), (own, _) = attached("per-row", optimizer, attach_first, **policy)
    parts = get_state_dict(model, own)
    into = {"model": parts[0], "optimizer": parts[1]}
    dcp.load(into, checkpoint_id=folder)
    set_state_dict(model, own, model_state_dict=into["model"], optim_state_dict=into["optimizer"])
    both, optimizers = (model, alone), [own, optimizers[1]]
    steps(mesh, both, optimizers)
    check(*both)

    delta, state = gradsel.Delta.of(model), whole_state(model)
    for name, part in gradsel.Delta.of(alone).items():
        assert (delta[name].digest, delta[name].fingerprint) == (part.digest, part.fingerprint), name
        torch.testing.assert_close(delta[name].values, part.values, rtol=0, atol=1e-12)
    base = models()[0]
    with delta.applied(base):
        assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    if attach_first:
        return
    merged = whole_state(gradsel.detach(model))
    check_equal(merged, gradsel.detach(alone).state_dict())
    for name, mask in models()[2].items():
        assert torch.equal(merged[name], state[name]), name
        assert torch.equal(merged[name][~mask.to_dense()], before[name][~mask.to_dense()]), name


def steps(mesh, both, optimizers) -> None:
    for batch in batches():
        for each, optimizer, part in zip(both, optimizers, (share(batch, mesh), batch), strict=False):
            optimizer.zero_grad()
            cross_entropy(each, part).backward()
            optimizer.step()


@pytest.mark.supports("offload", "attach", "MaskedAdam", "other optimizers", "save/load", "delta", "merge")
@pytest.mark.parametrize(("optimizer", "attach_first"), [("MaskedAdamW", True), ("AdamW", False)])
def test_offload(ranks, optimizer, attach_first):
    ranks.run(offloaded, optimizer, attach_first)


def checkpointed(attach_first: bool) -> None:
    """Activation checkpointing, whose forward runs again in backward."""
    mesh = meshes()["four"]
    model, alone, selection = models()
    if attach_first:
        gradsel.attach(model, selection)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = fully_shard(checkpoint_wrapper(block), mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not attach_first:
        gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    both = model, alone
    steps(mesh, both, [OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)) for each in both])
    state = {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in whole_state(model).items()}
    check_equal(state, alone.state_dict())


@pytest.mark.parametrize("attach_first", [True, False])
def test_activation_checkpointing(ranks, attach_first):
    ranks.run(checkpointed, attach_first)


def mixed(attach_first: bool) -> None:
    """Gradients of selected entries are those of the dense model under the same policy, up to a rounding."""
    mesh = meshes()["four"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, dense, selection = models(dtype=torch.float32)
    for each in (model, dense):
        each.bn = torch.nn.Identity()  # on the CPU, BatchNorm does not take a mixture of dtypes
    selection = gradsel.Selection({name: mask for name, mask in selection.items() if not name.startswith("bn.")})
    shard_attached(model, selection, mesh, attach_first, mp_policy=policy)
    shard(dense, mesh, mp_policy=policy)
    batch = share(batches(torch.float32)[0], mesh)
    for each in (model, dense):
        cross_entropy(each, batch).float().backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in dense.named_parameters():
        mask = selection[name]
        if mask.nnz and parameter.grad is not None:
            own = grads[name if mask.is_whole else name + "_values"]
            assert own.dtype is torch.float32
            expected = mask.gather(whole(parameter.grad))
            torch.testing.assert_close(own, expected, rtol=2**-5, atol=2e-2 * float(expected.abs().max()))
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model))
    optimizer.step()
    check_written(model)
    check_alike(whole_state(model))


@pytest.mark.parametrize("attach_first", [True, False])
def test_mixed_precision(ranks, attach_first):
    ranks.run(mixed, attach_first)


def written(kind: str, attach_first: bool) -> None:
    """Whoever writes values or weights between two steps is heard at the next forward."""
    mesh = meshes()["four"]
    model, alone, selection = models(kind)
    shard_attached(model, selection, mesh, attach_first)
    gradsel.attach(alone, selection)
    batch = batches()[0]
    for change in ("nothing", "values", "weight"):
        with torch.no_grad():
            for each in (model, alone):
                layer = each.blocks[1].fc1
                if change == "values":
                    layer.weight_values.mul_(1.5)
                elif change == "weight":
                    layer.weight.add_(0.25)
        losses = [
            cross_entropy(each, part) for each, part in zip((model, alone), (share(batch, mesh), batch), strict=True)
        ]
        losses[0].backward()
        mean = losses[0].detach() / mesh.size()
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(mean, losses[1].detach(), rtol=0, atol=1e-12)
        check(model, alone)


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("kind", ["per-row", "irregular"])
def test_writing_by_hand(ranks, kind, attach_first):
    ranks.run(written, kind, attach_first)


def other_masks(kind: str, attach_first: bool) -> None:
    """One rank has other entries of one weight: as many of a mask by rows, another number of an irregular one."""
    mesh = meshes()["four"]
    model, _, selection = models(kind)
    if mesh.get_local_rank() == 2:
        mask = selection["blocks.0.fc1.weight"].to_dense()
        other = mask.roll(1, 1) if kind == "per-row" else mask | (torch.arange(mask.shape[1]) == 1)
        selection = gradsel.Selection(dict(selection) | {"blocks.0.fc1.weight": from_dense(other)})
    with pytest.raises(RuntimeError, match=r"1 parameters differ, first blocks.0.fc1.weight"):
        shard_attached(model, selection, mesh, attach_first)


@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-shard", "shard-attach"])
@pytest.mark.parametrize("kind", ["per-row", "irregular"])
def test_ranks_with_different_masks(ranks, kind, attach_first):
    ranks.run(other_masks, kind, attach_first)


def early_optimizer() -> None:
    mesh = meshes()["four"]
    model, _, selection = models()
    gradsel.attach(model, selection)
    optimizer = torch.optim.SGD(gradsel.trainable_parameters(model), lr=0.1)
    shard(model, mesh)
    cross_entropy(model, share(batches()[0], mesh)).backward()
    with pytest.raises(RuntimeError, match=r"Make the optimizer after fully_shard\(\)"):
        optimizer.step()


def test_an_optimizer_made_too_early(ranks):
    ranks.run(early_optimizer)


def evaluated_first() -> None:
    """FSDP does not free what it gathers for the root before backward."""
    mesh, (model, _), _ = attached()
    with torch.no_grad():
        model(share(batches()[0], mesh)[0])
    for ready in (False, True):
        if ready:
            model.reshard()
        optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model))
        cross_entropy(model, share(batches()[0], mesh)).backward()
        with nullcontext() if ready else pytest.raises(RuntimeError, match=r"call model.reshard\(\) first"):
            optimizer.step()


def test_an_optimizer_made_after_an_evaluation(ranks):
    ranks.run(evaluated_first)


def compiled_step(kind: str) -> None:
    mesh, both, optimizers = attached(kind)
    compiled = torch.compile(lambda: optimizers[0].step())
    for batch in batches():
        for each, optimizer, part in zip(both, optimizers, (share(batch, mesh), batch), strict=True):
            optimizer.zero_grad()
            cross_entropy(each, part).backward()
        compiled()
        optimizers[1].step()
    check(*both)


def test_a_compiled_step(ranks):
    ranks.run(compiled_step, "per-row")


def ignored(attach_first: bool) -> None:
    mesh = meshes()["four"]
    model, _, selection = models()
    if attach_first:
        gradsel.attach(model, selection)
    shard(model, mesh, ignored_params={model.blocks[0].fc1.weight})
    if not attach_first:
        with pytest.raises(ValueError, match=r"blocks.0.fc1.weight is no part of what FSDP shards.*freeze it"):
            gradsel.attach(model, selection)
        assert not gradsel.attached.is_attached(model)
    else:
        with pytest.raises(RuntimeError, match=r"blocks.0.fc1.weight is among its ignored_params: take it out"):
            model(share(batches()[0], mesh)[0])


@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-shard", "shard-attach"])
def test_a_weight_that_fsdp_ignores(ranks, attach_first):
    ranks.run(ignored, attach_first)


def half_precision() -> None:
    """Values are float32 beside parameters in bfloat16, which FSDP does not reduce together."""
    mesh = meshes()["four"]
    batch = share(batches(torch.bfloat16)[0], mesh)
    model, other, selection = models(dtype=torch.bfloat16)
    gradsel.attach(model, selection)
    shard(model, mesh)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        model(batch[0])
    shard(other, mesh)
    gradsel.attach(other, selection)
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(other))
    cross_entropy(other, batch).backward()
    assert other.head.weight.grad.dtype is torch.bfloat16
    assert other.blocks[0].fc1.weight_values.grad.dtype is torch.float32
    optimizer.step()
    check_written(other)
    check_alike(whole_state(other))


def test_half_precision(ranks):
    ranks.run(half_precision)


def converted() -> None:
    """A sharded model may be moved, and is not cast."""
    mesh, both, optimizers = attached()
    both[0].to("cpu")
    for cast in (both[0].float, lambda: both[0].to(torch.bfloat16), both[0].blocks[0].fc1.half):
        with pytest.raises(RuntimeError, match=r"cast it before fully_shard\(\)"):
            cast()
    steps(mesh, both, optimizers)
    check(*both)
    policy = gradsel.PerNeuron(1)
    plain = shard(models()[0], mesh)
    with pytest.raises(ValueError, match=r"DTensor, in which policy= cannot select"):
        gradsel.MaskedAdam(plain.named_parameters(), policy=policy, model=plain)
    with pytest.raises(ValueError, match=r"DTensor, for which MaskedAdam takes no mask"):
        gradsel.MaskedAdam(plain.named_parameters(), masks=models()[2])


def test_conversions_and_masks(ranks):
    ranks.run(converted)
