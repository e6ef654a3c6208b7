"""accelerate's FSDP2: prepare() shards an attached model and gives its optimizer the shards.

accelerate takes a CPU for no device to shard over, so it is told after it has been made.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

import gradsel
from tests.support.sharded import OPTIMIZERS, batches, check_equal, check_written, meshes, models, share, whole_state
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")


def prepared(optimizer_name: str) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "FSDP_VERSION": "2"}
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model, alone, selection = models()
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    optimizer = OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(model))
    model, optimizer = accelerator.prepare(model, optimizer)
    own = OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(alone))
    for batch in batches():
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model, share(batch, meshes()["four"])))
        accelerator.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        own.zero_grad()
        cross_entropy(alone, batch).backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        own.step()
    assert any(type(module).__name__ == "FSDPBlock" for module in model.modules())
    check_equal(whole_state(model), alone.state_dict())
    check_written(model)


@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "AdamW"])
def test_prepare(ranks, optimizer):
    ranks.run(prepared, optimizer)
