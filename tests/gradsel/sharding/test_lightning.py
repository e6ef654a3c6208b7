"""Lightning's strategies of several processes: an attached model trains in a LightningModule as in one process.

``FSDPStrategy`` runs on GPUs only, and with the former FSDP, which attached models refuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

import gradsel
from tests.support.sharded import (
    OPTIMIZERS,
    Optimizer,
    batches,
    check_alike,
    check_equal,
    meshes,
    models,
    shard,
    share,
    whole_state,
)
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")


class Lit(lightning.LightningModule):
    def __init__(self, model: nn.Module, make: Optimizer, sharded: bool) -> None:
        super().__init__()
        self.model, self.make, self.sharded = model, make, sharded

    def configure_model(self) -> None:
        if self.sharded:
            shard(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return cross_entropy(self.model.eval(), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(gradsel.trainable_parameters(self))


STRATEGIES: dict[str, Callable[[], Any]] = {
    "DDP": DDPStrategy,
    "model parallel": lambda: ModelParallelStrategy(
        data_parallel_size=4, tensor_parallel_size=1, save_distributed_checkpoint=False
    ),
}


def fitted(name: str, optimizer: str) -> None:
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    model, alone, selection = models()
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    module = Lit(model, OPTIMIZERS[optimizer], sharded=name == "model parallel")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=4, strategy=STRATEGIES[name](), plugins=[TorchElasticEnvironment()],
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    own = [share(batch, meshes()["four"]) for batch in batches()]
    trainer.fit(module, DataLoader(own, batch_size=None))
    assert trainer.global_step == len(own)
    reference = OPTIMIZERS[optimizer](gradsel.trainable_parameters(alone))
    for batch in batches():
        reference.zero_grad()
        cross_entropy(alone, batch).backward()
        reference.step()
    state = whole_state(model)
    check_alike(state)
    check_equal(state, alone.state_dict())


@pytest.mark.supports("DDP", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "AdamW"])
def test_ddp(ranks, optimizer):
    ranks.run(fitted, "DDP", optimizer)


@pytest.mark.supports("FSDP2", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "AdamW"])
def test_model_parallel(ranks, optimizer):
    ranks.run(fitted, "model parallel", optimizer)


def wrapped() -> None:
    model, plain, selection = models()
    gradsel.attach(model, selection)
    device = torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"patch_embed.weight is attached.*use fully_shard\(\)"):
        FullyShardedDataParallel(model, use_orig_params=True, device_id=device)
    with pytest.raises(ValueError, match=r"wrapped in FullyShardedDataParallel.*fully_shard"):
        gradsel.attach(FullyShardedDataParallel(plain, use_orig_params=True, device_id=device), selection)


def test_the_former_fsdp_is_refused(ranks):
    ranks.run(wrapped)
