"""transformers' Trainer with its FSDP arguments: trained, stopped and resumed as in one process.

accelerate takes a CPU for no device to shard over, so its state is changed when a Trainer has made it.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers

import gradsel
from gradsel.integrations.transformers import SparseCheckpoints, masked_adamw
from gradsel.selection import Selection
from tests.support import tiny
from tests.support.sharded import check_equal

pytestmark = pytest.mark.xdist_group("ranks")
STEPS, RATE = 3, 1e-2


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny.bert_config(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config).double()


def chosen() -> Selection:
    return gradsel.select(bert(), None, None, gradsel.PerNeuron(2), "magnitude")


def samples() -> list[dict[str, torch.Tensor]]:
    batch = tiny.texts()[0]
    return [{name: tensor[number] for name, tensor in batch.items()} for number in range(8)]


def alone(selection: Selection) -> gradsel.Delta:
    """Of one process that takes all samples at every step."""
    model = bert()
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdamW(gradsel.trainable_parameters(model), lr=RATE, eps=1e-3, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**tiny.texts()[0]).loss.backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    return gradsel.Delta.of(model)


def trainer(folder: str, model: torch.nn.Module, steps: int, efficient: bool) -> transformers.Trainer:
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=RATE, adam_epsilon=1e-3,
        lr_scheduler_type="constant", max_grad_norm=0.5, use_cpu=True, save_steps=1, disable_tqdm=True,
        report_to="none", average_tokens_across_devices=False, fsdp=True,
        fsdp_config={
            "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"],
            "cpu_ram_efficient_loading": efficient,
        },
    )  # fmt: skip
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    made = transformers.Trainer.create_accelerator_and_postprocess

    def create(self: Any) -> None:
        made(self)
        PartialState._shared_state |= {"distributed_type": DistributedType.FSDP}
        self.accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        self.is_fsdp_enabled = True

    with mock.patch.object(transformers.Trainer, "create_accelerator_and_postprocess", create):
        return transformers.Trainer(
            model, arguments, train_dataset=samples(), optimizer_cls_and_kwargs=masked_adamw(arguments)
        )


def trained(folder: str, efficient: bool) -> None:
    from accelerate.state import AcceleratorState

    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    AcceleratorState._reset_state(True)
    selection = chosen()
    expected = alone(selection)
    for steps, resumed in ((STEPS - 1, None), (STEPS, f"{folder}/checkpoint-{STEPS - 1}")):
        model = bert()
        if efficient and dist.get_rank() > 0:  # as transformers loads a model then: only the first rank has the weights
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        gradsel.attach(model, selection)
        run = trainer(folder, model, steps, efficient)
        run.train(resume_from_checkpoint=resumed)
    assert any(type(module).__name__ == "FSDPBertLayer" for module in run.model.modules())
    delta = gradsel.Delta.of(run.model)
    check_equal(
        {name: part.values for name, part in delta.items()}, {name: part.values for name, part in expected.items()}
    )
    if dist.get_rank() == 0:
        plain = bert()
        delta.apply_(plain)  # checks that it is the base
    with pytest.raises(ValueError, match="the Trainer shards the model"):
        run.add_callback(SparseCheckpoints(run))


@pytest.mark.supports("FSDP2", "MaskedAdam", "save/load")
@pytest.mark.parametrize("efficient", [False, True], ids=["whole", "efficient loading"])
def test_fsdp_arguments(ranks, efficient, tmp_path):
    ranks.run(trained, str(tmp_path), efficient)
