"""Several processes: what would let their models drift apart is refused, on every one of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradsel
from tests.support.selections import data, toy
from tests.support.toy import Toy, cross_entropy

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")


def meet(rank: int, world: int, folder: str, test: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    globals()[test](rank)
    dist.barrier()
    dist.destroy_process_group()


def alone_or_together(rank: int) -> None:
    model = Toy().eval()
    with pytest.raises(ValueError, match=r"process_group=torch\.distributed\.group\.WORLD"):
        gradsel.select(model, data()[rank : rank + 1], cross_entropy)
    together = gradsel.select(model, data()[rank : rank + 1], cross_entropy, process_group=dist.group.WORLD)
    gradsel.attach(model, together)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(parallel), lr=1e-2)
    cross_entropy(parallel, data()[rank]).backward()
    optimizer.step()


def other_masks(rank: int) -> None:
    model, selection = toy()
    masks = dict(selection)
    if rank:
        name = "blocks.0.fc1.weight"
        view = masks[name].view
        cols = (masks[name].cols + 1) % masks[name].shape[1]
        masks[name] = type(masks[name])(cols.sort(1).values, masks[name].shape, view)
    gradsel.attach(model, gradsel.Selection(masks))
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"1 parameters differ, first blocks.0.fc1.weight"):
            parallel(data()[0][0])


def wrapped_before(rank: int) -> None:
    model, selection = toy()
    parallel = DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*attach"):
        gradsel.attach(parallel, selection)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in toy()[0].parameters()]


@pytest.mark.parametrize("test", [alone_or_together, other_masks, wrapped_before], ids=lambda t: t.__name__)
def test_two_processes(test, tmp_path):
    torch.multiprocessing.spawn(meet, (2, str(tmp_path), test.__name__), nprocs=2)
