"""DistributedDataParallel with two processes: what is sent, and that both hold the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import gradsel
from tests.support.selections import check_consistent, check_frozen, data, frozen_entries, toy
from tests.support.toy import cross_entropy

STEPS = 4


OPTIMIZERS = {
    "MaskedAdam": lambda parameters: gradsel.MaskedAdam(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # unlike Adam, it does not normalise errors away
}


def train(rank: int, world: int, folder: str, optimizer_name: str) -> None:
    """One process: trains on its share of every batch, and records its weights and what it sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model, selection = toy(dtype=torch.float64)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    model.eval()  # no dropout, which the two processes could not draw alike
    parallel = DistributedDataParallel(model)
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    parallel.register_comm_hook(None, count)
    parameters = gradsel.trainable_parameters(parallel)
    optimizer = OPTIMIZERS[optimizer_name](parameters)
    for images, labels in data(torch.float64, count=STEPS):
        share = slice(rank * 5, rank * 5 + 5)
        optimizer.zero_grad()
        cross_entropy(parallel, (images[share], labels[share])).backward()
        optimizer.step()
    check_consistent(model)
    check_frozen(model, selection, before)
    torch.save(
        {
            "sent": sum(sent),
            "trained": sum(parameter.numel() for parameter in parameters),
            "state": model.state_dict(),
        },
        Path(folder) / f"rank{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.supports("DDP", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_processes(tmp_path, optimizer):
    torch.multiprocessing.spawn(train, (2, str(tmp_path), optimizer), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["sent"] == STEPS * 8 * first["trained"]  # the values and the whole parameters, in float64
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name

    # One process on the whole batch computes the same up to rounding.
    model, selection = toy(dtype=torch.float64)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradsel.attach(model, selection)
    model.eval()
    alone = OPTIMIZERS[optimizer](gradsel.trainable_parameters(model))
    for batch in data(torch.float64, count=STEPS):
        alone.zero_grad()
        cross_entropy(model, batch).backward()
        alone.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, first["state"][name], rtol=1e-9, atol=1e-9 if optimizer == "SGD" else 1e-3)
    assert not torch.equal(first["state"]["blocks.0.fc1.weight"], start["blocks.0.fc1.weight"])
