"""torch.compile of attached models that are sharded or parallel: they train what one process trains eagerly."""

from __future__ import annotations

import pytest
import torch

import gradsel
from gradsel.nn import tensor_parallel
from tests.support.parallel import prepared, share
from tests.support.sharded import OPTIMIZERS, batches, check_equal, check_written, whole_state
from tests.support.toy import Toy, cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")


def train(order: str, kind: str, blocks: bool) -> None:
    """The order is that of :func:`prepared`; (c) is torch.compile of the model, or of each of its blocks."""
    compiled = []

    def compile_(model: Toy) -> None:
        if not blocks:  # FSDP's own hooks around the model break its graph
            compiled.append(torch.compile(model, backend="aot_eager", fullgraph="s" not in order))
        for block in model.blocks if blocks else ():
            block.compile(backend="aot_eager", fullgraph=True)

    torch._dynamo.reset()
    model, alone = prepared(order, kind, compile_)
    callables = compiled[0] if compiled else model, alone
    optimizers = [OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)) for each in (model, alone)]
    harvest = tensor_parallel._harvest
    tensor_parallel._harvest = lambda *args: pytest.fail("a Linear layer forms a dense gradient")
    try:
        for batch in batches():
            for call, optimizer, part in zip(callables, optimizers, (share(batch, order), batch), strict=True):
                optimizer.zero_grad()
                cross_entropy(call, part).backward()
                optimizer.step()
    finally:
        tensor_parallel._harvest = harvest
        torch._dynamo.reset()
    check_equal(whole_state(model), alone.state_dict())
    check_written(model)


@pytest.mark.parametrize(
    ("order", "kind", "blocks"), [("acs", "per-row", False), ("asc", "irregular", True), ("sac", "per-row", True)]
)
def test_fsdp(ranks, order, kind, blocks):
    ranks.run(train, order, kind, blocks)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 cannot trace the backward of layers with DTensors")
@pytest.mark.parametrize(
    ("order", "kind", "blocks"),
    [("pac", "per-row", False), ("pca", "irregular", True), ("pasc", "per-row", True), ("psac", "per-row", False)],
)
def test_tensor_parallelism(ranks, order, kind, blocks):
    ranks.run(train, order, kind, blocks)
