"""Two processes that select together choose what one would, and neither waits for one that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradsel
from tests.support.toy import Toy, batches, cross_entropy


def choose(rank: int, world: int, folder: str) -> None:
    """One process: selects together with the others from its share of the batches, and saves the masks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = Uneven()
    share = list(range(rank, 3, world))  # two batches for one process, one for the other
    parallel = DistributedDataParallel(model)
    masks = {}
    for name, arguments in CHOICES.items():
        selection = gradsel.select(parallel, [(rank, *batches()[i]) for i in share], uneven_loss, **arguments)
        masks[name] = {key: mask.to_dense() for key, mask in selection.items()}
        assert selection.notes["batches"] == 3
    alone = gradsel.select(
        model, [(rank, *batches()[i]) for i in share], uneven_loss, process_group=dist.group.WORLD
    )  # not wrapped, but given the process group
    masks["alone"] = {key: mask.to_dense() for key, mask in alone.items()}
    with pytest.raises(ValueError, match=r"memory='streaming' .*ranks"):
        gradsel.select(parallel, [(rank, *batches()[0])], uneven_loss, memory="streaming")
    loss = cross_entropy(parallel, batches()[0])
    loss.backward()  # the wrapper still works, and reduces
    torch.save({"masks": masks, "grad": model.toy.head.weight.grad}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


class Uneven(torch.nn.Module):
    """A model with a layer that only one process uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.toy = Toy().eval()
        self.toy.unused.requires_grad_(False)
        self.toy.tokens.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.toy(images)


def uneven_loss(model: torch.nn.Module, batch: tuple) -> torch.Tensor:
    rank, *rest = batch
    loss = cross_entropy(model, rest)
    toy = next(module for module in model.modules() if isinstance(module, Toy))
    return loss + (toy.unused(toy.features(rest[0])).square().mean() if rank == 1 else 0.0)


CHOICES = {
    "full": {"memory": "full"},
    "grouped": {"max_gradient_bytes": 9000},
    "absolute": {"criterion": "absolute", "policy": gradsel.Global(fraction=0.02)},
    "rows": {"policy": gradsel.Rows(2)},
}


@pytest.mark.supports("DDP", "select")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes_select_what_one_does(tmp_path):
    torch.multiprocessing.spawn(choose, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(first["grad"], second["grad"])
    data = [(i % 2, *batch) for i, batch in enumerate(batches())]
    for name, masks in first["masks"].items():
        expected = gradsel.select(Uneven(), data, uneven_loss, **CHOICES.get(name, {}))
        assert masks["toy.unused.weight"].any()
        for key, mask in masks.items():
            assert torch.equal(mask, second["masks"][name][key]), (name, key)
            assert (mask == expected[key].to_dense()).float().mean() > 0.999, (name, key)  # the order of sums differs


def fail_alone(rank: int, world: int, folder: str) -> None:
    """One process: the first meets a loss that is not finite, the second has no batches and a BatchNorm."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = Toy()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)

    def loss(model, batch):
        return cross_entropy(model, batch) * (float("nan") if rank == 0 else 1.0)

    expected = {0: (ValueError, "batch 1 .*nan"), 1: (RuntimeError, "rank 0 .*ValueError")}
    error, message = expected[rank]
    with pytest.raises(error, match=message):
        gradsel.select(parallel, batches(), loss)
    selection = gradsel.select(parallel, [] if rank else batches(), cross_entropy)  # one rank has no data
    assert selection.notes["batches"] == 3
    torch.save({name: mask.to_dense() for name, mask in selection.items()}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_no_process_waits_for_one_that_failed_or_has_no_data(tmp_path):
    torch.multiprocessing.spawn(fail_alone, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())
