"""Two processes that do the same to one model, and train it in DistributedDataParallel."""

from __future__ import annotations

import datetime
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.support.chaos.actions import ACTIONS
from tests.support.chaos.playing import play
from tests.support.chaos.training import check_gradients, make_optimizer
from tests.support.chaos.world import TOKENS, World

#: Rows of the batch by rank: two each, so that each rank uses both experts.
SHARES = [[0, 1], [2, 0]]


def train_parallel(world: World) -> None:
    """A step, each rank on its share: gradients are the mean of the dense ones, and the ranks stay equal."""
    for p in world.model.parameters():
        p.grad = None
    if world.optimizer is None:
        world.optimizer = make_optimizer(world)
    rows = SHARES[dist.get_rank()]
    parts = [world.dense_gradients(share) for share in SHARES]
    dense = {name: (part + parts[1][name]) / 2 for name, part in parts[0].items()}
    parallel = DistributedDataParallel(world.model)
    world.loss(parallel(TOKENS[rows]), rows).backward()
    check_gradients(world, dense)
    world.optimizer.step()
    state = world.dense()
    own = torch.cat([tensor.double().flatten() for tensor in state.values()])
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(own, first), "the ranks drift apart"


def play_together(rank: int, folder: str, sequences: int) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience)
    for seed in range(sequences):
        play(seed, [*ACTIONS, *[train_parallel] * len(ACTIONS)])
    dist.destroy_process_group()
