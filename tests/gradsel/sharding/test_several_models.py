"""Modules that are attached each on its own: the stages of a pipeline, and models side by side in a process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

import gradsel
from tests.support import parallel
from tests.support.sharded import (
    OPTIMIZERS,
    batches,
    check_equal,
    check_written,
    common_folder,
    meshes,
    models,
    shard_attached,
    share,
    whole_state,
)
from tests.support.toy import Toy, cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Stage(nn.Module):
    """One of two halves of the toy; its parameters have the names that they have in the toy."""

    def __init__(self, model: Toy, number: int) -> None:
        super().__init__()
        if number == 0:
            self.patch_embed, self.bn = model.patch_embed, model.bn
            self.cls_token, self.pos_embed = model.cls_token, model.pos_embed
        else:
            self.head = model.head
        self.blocks = nn.ModuleDict({str(number): model.blocks[number]})

    def forward(self, x: Tensor) -> Tensor:
        if "0" not in self.blocks:
            return self.head(self.blocks["1"](x)[:, 0])
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.blocks["0"](self.bn(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed))


def pipeline(schedule_name: str, kind: str, optimizer_name: str, sharded: bool) -> None:
    """Two ranks hold a stage each; two such pipelines do the same, or share each stage and every batch."""
    group, number = meshes()["two"].get_group(), meshes()["two"].get_local_rank()
    base, alone, selection = models(kind)
    stage = Stage(models(kind)[0], number)
    names = dict(stage.named_parameters())
    gradsel.attach(stage, gradsel.Selection({name: mask for name, mask in selection.items() if name in names}))
    gradsel.attach(alone, selection)
    if sharded:
        for module in (stage.blocks[str(number)], stage):
            fully_shard(module, mesh=meshes()["hybrid"]["replicate"])
    schedule = SCHEDULES[schedule_name](
        PipelineStage(stage, number, 2, torch.device("cpu"), group=group), n_microbatches=3, loss_fn=F.cross_entropy
    )
    optimizers = [OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(each)) for each in (stage, alone)]
    for batch in batches():
        images, labels = parallel.share(batch, "s" if sharded else "")
        for optimizer in optimizers:
            optimizer.zero_grad()
        if number == 0:
            schedule.step(images)
        else:
            schedule.step(target=labels)
        cross_entropy(alone, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
    expected = alone.state_dict()
    check_equal(whole_state(stage), {name: expected[name] for name in stage.state_dict()})
    check_written(stage)

    folder = common_folder()
    delta = gradsel.Delta.of(stage)
    if meshes()["hybrid"]["replicate"].get_local_rank() == 0:
        delta.save(folder / f"{number}.safetensors")
    dist.barrier()
    for each in range(2):
        gradsel.Delta.load(folder / f"{each}.safetensors").apply_(base)
    check_equal(base.state_dict(), {name: expected[name] for name in base.state_dict()})


@pytest.mark.parametrize(
    ("schedule", "kind", "optimizer", "sharded"),
    [
        ("GPipe", "per-row", "MaskedAdamW", False),
        ("1F1B", "irregular", "AdamW", False),
        ("GPipe", "per-row", "MaskedAdamW", True),
        ("1F1B", "rows", "MaskedAdamW", True),
    ],
)
def test_pipeline(ranks, schedule, kind, optimizer, sharded):
    ranks.run(pipeline, schedule, kind, optimizer, sharded)


def side_by_side() -> None:
    """Two FSDP models that learn from each other, one of them attached before and one after fully_shard()."""
    mesh = meshes()["four"]
    pairs = []
    for kind, attach_first in (("per-row", True), ("irregular", False)):
        model, alone, selection = models(kind)
        shard_attached(model, selection, mesh, attach_first)
        gradsel.attach(alone, selection)
        pairs.append((model, alone))
    both = list(zip(*pairs, strict=True))
    one = OPTIMIZERS["MaskedAdamW"]([p for model in both[0] for p in gradsel.trainable_parameters(model)])
    own = [OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(alone)) for alone in both[1]]
    for batch in batches():
        for (first, second), (images, labels) in zip(both, (share(batch, mesh), batch), strict=True):
            logits = first(images), second(images)
            (F.mse_loss(*logits) + F.cross_entropy(logits[0], labels)).backward()
        for optimizer in (one, *own):
            optimizer.step()
            optimizer.zero_grad()
    for model, alone in pairs:
        check_equal(whole_state(model), alone.state_dict())
        check_written(model)


def test_two_models(ranks):
    ranks.run(side_by_side)
