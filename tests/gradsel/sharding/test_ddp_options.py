"""DistributedDataParallel with its options, hooks and companions: attached models train as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import gradsel
from tests.support.selections import check_consistent
from tests.support.sharded import OPTIMIZERS, SIZE, batches, check_alike, check_equal, meshes, models, share
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")
RATE = {"lr": 1e-2, "eps": 1e-3}


def pair() -> tuple[nn.Module, nn.Module]:
    """Two equal attached models."""
    model, alone, selection = models()
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    return model, alone


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    optimizer.step()


def compare(model: nn.Module, alone: nn.Module, tolerance: float = 1e-12) -> None:
    with torch.no_grad():
        model(batches()[0][0])
    check_consistent(model)
    check_alike(model.state_dict())
    check_equal(model.state_dict(), alone.state_dict(), tolerance)


def with_options(options: dict[str, Any], hook: str | None, tolerance: float) -> None:
    model, alone = pair()
    parallel = DistributedDataParallel(model, **options)
    if hook == "bf16":
        parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif hook == "PowerSGD":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(parallel))
    own = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(alone))
    for batch in batches():
        step(parallel, optimizer, share(batch, meshes()["four"]))
        step(alone, own, batch)
    compare(model, alone, tolerance)


@pytest.mark.supports("DDP", "attach", "MaskedAdam")
@pytest.mark.parametrize(
    ("options", "hook", "tolerance"),
    [
        ({"static_graph": True}, None, 1e-12),
        ({"find_unused_parameters": True}, None, 1e-12),
        ({"gradient_as_bucket_view": True}, None, 1e-12),
        ({"broadcast_buffers": False, "bucket_cap_mb": 0.001}, None, 1e-12),
        ({}, "bf16", 1e-3),  # of three steps of 1e-2
        ({}, "PowerSGD", 3e-2),  # approximates by design: ranks must not drift apart
    ],
    ids=["static graph", "find unused", "bucket view", "small buckets", "bfloat16 hook", "PowerSGD hook"],
)
def test_options(ranks, options, hook, tolerance):
    ranks.run(with_options, options, hook, tolerance)


def with_sharded_optimizer(optimizer: str, as_views: bool) -> None:
    """Each rank updates some of the values and sends them to the others, as views of one block of memory or not."""
    kinds = {"MaskedAdamW": gradsel.MaskedAdamW, "AdamW": torch.optim.AdamW}
    model, alone = pair()
    parallel = DistributedDataParallel(model)
    sharded = ZeroRedundancyOptimizer(
        gradsel.trainable_parameters(parallel), kinds[optimizer], parameters_as_bucket_view=as_views, **RATE
    )
    own = kinds[optimizer](gradsel.trainable_parameters(alone), **RATE)
    for batch in batches():
        step(parallel, sharded, share(batch, meshes()["four"]))
        step(alone, own, batch)
    compare(model, alone)


@pytest.mark.supports("DDP", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "AdamW"])
@pytest.mark.parametrize("as_views", [False, True], ids=["", "views"])
def test_zero_redundancy_optimizer(ranks, optimizer, as_views):
    ranks.run(with_sharded_optimizer, optimizer, as_views)


def with_uneven_inputs() -> None:
    """Ranks that have no more batches join in with gradients of zero."""
    model, alone = pair()
    parallel = DistributedDataParallel(model)
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(parallel))
    own = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(alone))
    given = batches()
    counts = [3, 1, 2, 3]  # batches of each rank
    with Join([parallel]):
        for batch in given[: counts[dist.get_rank()]]:
            step(parallel, optimizer, share(batch, meshes()["four"]))
    each = SIZE // 4
    for number, (images, labels) in enumerate(given):
        own.zero_grad()
        for rank, count in enumerate(counts):
            if number < count:
                part = slice(rank * each, (rank + 1) * each)
                (cross_entropy(alone, (images[part], labels[part])) / 4).backward()
        own.step()
    compare(model, alone)  # Join has sent the model of a rank that trained to the end to all others


def test_join(ranks):
    ranks.run(with_uneven_inputs)
