"""The task of a run, by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsel.training.classification import Classification
from gradsel.training.config import CONFIG, Config, PathLike, read_config
from gradsel.training.segmentation.task import Segmentation
from gradsel.training.task import Task

CLASSIFICATION, SEGMENTATION = Classification(), Segmentation()


def task_of(config: Config) -> Task:
    """The task of a run."""
    return SEGMENTATION if config.data.task == SEGMENTATION.name else CLASSIFICATION


def described(folder: PathLike, metrics: Mapping[str, Any]) -> str:
    """Metrics of a run, as :func:`gradsel.evaluate` returns them, for a terminal."""
    return task_of(read_config(Path(folder) / CONFIG)).described(metrics)
