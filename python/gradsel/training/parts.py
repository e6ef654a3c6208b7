"""What a run consists of before it writes anything: task, data, method, recipe, device and model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gradsel.errors import RunError, did_you_mean
from gradsel.methods import Method
from gradsel.nn.buffers import saved_buffers
from gradsel.training.config import Config
from gradsel.training.data import Data, portable_path
from gradsel.training.models import Loaded
from gradsel.training.presets import preset_settings
from gradsel.training.processes import ALONE, Processes
from gradsel.training.recipe import Recipe
from gradsel.training.task import Task
from gradsel.training.tasks import task_of


@dataclass
class Parts:
    task: Task
    data: Data
    how: Method
    recipe: Recipe
    device: torch.device
    loaded: Loaded
    processes: Processes
    #: Bytes of the model's own parameters and buffers, tied ones once.
    bytes: int

    def batch_size(self, config: Config) -> int:
        """Samples of a batch in this process."""
        return config.recipe.batch_size // self.processes.count


def load_parts(config: Config, processes: Processes) -> Parts:
    """Everything that a run needs, before anything is written; cheap checks come first."""
    if config.recipe.batch_size % processes.count:
        raise RunError(
            f"recipe.batch_size is {config.recipe.batch_size}, which {processes.count} processes cannot share equally; "
            f"pass a multiple of {processes.count}"
        )
    task = task_of(config)
    how = task.method(config)
    device = device_of(config, processes)
    task.recipe(config, how, 2)
    _require_tracking(config.output.tracking)
    data = task.read(config)
    if told := _other_classes(config, data):
        data.notes.append(told)
    recipe = task.recipe(config, how, len(data.classes))
    if recipe.mixes and data.kind != "images":
        raise ValueError(f"recipe.mixup and recipe.cutmix mix images, but the data are {data.kind}")
    if config.recipe.patience is not None and "validation" not in data.splits:
        raise ValueError(
            "recipe.patience needs a validation set: a folder or table val beside train and test, or "
            "--validation-holdout"
        )
    loaded = task.load(config, data.classes, data.kind)
    loaded.model.to(device)
    tensors = [*loaded.model.parameters(), *saved_buffers(loaded.model).values()]
    size = sum(tensor.nbytes for tensor in tensors)
    return Parts(task, data, how, recipe, device, loaded, processes, size)


def _require_tracking(names: Sequence[str]) -> None:
    """Refuses what transformers cannot log to, before anything is written.

    Raises:
        ValueError: see above.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            raise ValueError(f"output.tracking: transformers logs to no {name!r}{hint}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"output.tracking: {name} is not installed: pip install {name}")


def _other_classes(config: Config, data: Data) -> str:
    """A warning if the preset is for a data set with another number of classes; empty if not."""
    if not config.preset or (expected := preset_settings(config.preset).classes) == len(data.classes):
        return ""
    return (
        f"warning: the preset {config.preset} is for data with {expected} classes, these have {len(data.classes)}; its "
        "settings were chosen for other data"
    )


def device_of(config: Config, processes: Processes = ALONE) -> torch.device:
    """The device to run on; each of several processes has its own GPU.

    Raises:
        ValueError: there is none such, or it does not have the precision.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("device: cuda was asked for, but torch sees no GPU; pass --device cpu")
    device = torch.device("cpu" if config.device == "cpu" or not available else "cuda")
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision: fp16 needs a GPU; pass bf16 or fp32")
    if device.type == "cuda" and processes.count > 1:
        if processes.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device: process {processes.local_rank} of this machine has no GPU, as torch sees "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs, or pass --device cpu"
            )
        device = torch.device("cuda", processes.local_rank)
    return device


def portable(config: Config) -> Config:
    """The same run from any working directory: local paths are absolute."""
    changes = {"data.path": portable_path(config.data.path), "output.folder": os.path.abspath(config.output.folder)}
    if config.data.root is not None:
        changes["data.root"] = os.path.abspath(config.data.root)
    if Path(config.model.name).is_dir():
        changes["model.name"] = os.path.abspath(config.model.name)
    return config.replaced(changes)
