"""evaluate() and predict(): what can be done with the folder of a finished run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.errors import RunError, expected
from gradsel.training.changed import changes
from gradsel.training.config import Config, PathLike, run_in
from gradsel.training.data import Split
from gradsel.training.evaluation import predictions
from gradsel.training.folder import RESULTS, read_labels, read_results
from gradsel.training.models import Loaded
from gradsel.training.parts import device_of
from gradsel.training.processes import ALONE, Processes, join
from gradsel.training.recipe import precision_dtype
from gradsel.training.tasks import task_of
from gradsel_kernels._warnings import user_stacklevel


def evaluate(folder: PathLike, data: PathLike | None = None) -> dict[str, Any]:
    """Tests the result in a folder.

    Args:
        folder: what :func:`finetune` wrote.
        data: other data, in a layout that finetune() takes, with some or all of the same classes; their test set counts
            if they have one, else all of them. None: the test set of the run.

    Returns:
        See :meth:`gradsel.training.task.Task.metrics` of the run's task.

    Raises:
        RunError: the folder has no finished run, or the model or the data do not fit.
        OtherRankFailed: another process has raised such an error.
    """
    with expected():
        folder, config = finished(folder)
    task, processes = task_of(config), join(config.device)
    with processes.together():
        classes = read_labels(folder)
        if data is None:
            found = task.read(config)
            split = found.splits["test"]
            if processes.first and (told := changes(folder, found, config.data.path, ("test",))):
                warnings.warn(
                    f"{config.data.path} has changed since the run in {folder} began, so these are not the numbers of "
                    f"its {RESULTS}: {told}",
                    stacklevel=user_stacklevel(),
                )
        else:
            found = task.read(config.replaced({"data.path": os.fspath(data), "data.layout": "auto"}), only_test=True)
            split = found.splits["test"]
            if found.kind != (kind := read_results(folder)["kind"]):
                raise RunError(f"data: the model is for {kind}, but these are {found.kind}")
        if found.classes != classes:
            numbers = {name: number for number, name in enumerate(classes)}
            if strange := [name for name in found.classes if name not in numbers]:
                raise RunError(f"data: the model knows no class {strange[0]!r} ({len(strange)} are unknown)")
            split = Split(split.inputs, [numbers[found.classes[label]] for label in split.labels])
        model, loaded, device = loaded_result(folder, config, classes, found.kind, processes)
        testing = task.testing(split, loaded, config)
    with processes.watched():
        return task.metrics(*predictions_of(config, model, loaded, testing, device, processes), classes, config)


def predict(folder: PathLike, inputs: Sequence[Any], top: int = 3) -> list[list[tuple[str, float]]]:
    """Classifies images or texts. (:func:`gradsel.training.predict_masks` is for segmentation.)

    Args:
        folder: what :func:`finetune` wrote.
        inputs: paths of images; or texts, or pairs of texts.
        top: how many classes to return.

    Returns:
        For each input the classes with the largest probabilities, the largest first.

    Raises:
        RunError: the folder has no finished run, or one of another task; an image cannot be read; or a pair of texts is
            not one.
    """
    with expected():
        require_list(inputs)
        folder, config = finished(folder)
        task = task_of(config)
        if task.name != "classification":
            raise RunError(f"the run in {folder} is one of {task.name}, so it has no classes to predict")
        classes = read_labels(folder)
        results = read_results(folder)
        split = Split(_checked_inputs(inputs, results), [0] * len(inputs))
        if not inputs:
            return []
        model, loaded, device = loaded_result(folder, config, classes, results["kind"])
        testing = task.testing(split, loaded, config)
    logits, _ = predictions_of(config, model, loaded, testing, device)
    probabilities = logits.softmax(1)
    best = probabilities.topk(min(top, len(classes)), dim=1)
    return [
        [(classes[number], float(value)) for value, number in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def require_list(inputs: Any) -> None:
    """Refuses a single text or path, whose letters would be taken for the inputs."""
    if isinstance(inputs, (str, os.PathLike)):
        raise ValueError(f"inputs must be a list, got a single one; pass [{os.fspath(inputs)!r}]")


def image_paths(given: Sequence[Any]) -> list[str]:
    """Paths of images that exist.

    Raises:
        ValueError: one is no path, a folder, or does not exist.
    """
    for path in given:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"the model takes images by their paths, got {path!r}")
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; name the images in it, as in {Path(path) / '*.jpg'}")
        if not Path(path).is_file():
            raise ValueError(f"there is no image {path}")
    return [os.fspath(path) for path in given]


def finished(folder: PathLike) -> tuple[Path, Config]:
    """The folder of a finished run, and its settings.

    Raises:
        ValueError: it has none.
    """
    folder, config = run_in(folder)
    if not (folder / RESULTS).is_file():
        raise ValueError(f"the run in {folder} is not finished; gradsel resume {folder} goes on with it")
    return folder, config


def loaded_result(
    folder: Path, config: Config, classes: list[str], kind: str, processes: Processes = ALONE
) -> tuple[nn.Module, Loaded, torch.device]:
    """The fine-tuned model of a finished run, what prepares its inputs, and the device it is on."""
    task = task_of(config)
    device = device_of(config.replaced({"device": "auto"}) if config.device == "cuda" else config, processes)
    loaded = task.load(config, classes, kind)
    try:
        model = task.method(config).load(loaded.model, folder)
    except FileNotFoundError as error:
        raise ValueError(f"the result in {folder} is incomplete: {error.filename or error} is missing") from error
    return model.to(device), loaded, device


def predictions_of(
    config: Config, model: nn.Module, loaded: Loaded, dataset: Any, device: torch.device, processes: Processes = ALONE
) -> tuple[Tensor, Tensor]:
    task = task_of(config)
    return predictions(
        model, dataset, task.collate(loaded), batch_size=config.recipe.batch_size, device=device,
        dtype=precision_dtype(config.precision), workers=config.data.workers, outputs=task.outputs, processes=processes,
    )  # fmt: skip


def _checked_inputs(inputs: Sequence[Any], results: dict[str, Any]) -> list[Any]:
    if results["kind"] == "images":
        return image_paths(inputs)
    columns = results["texts"]
    rows = [(each,) if isinstance(each, str) else tuple(each) for each in inputs]
    for row in rows:
        if len(row) != columns:
            raise ValueError(f"the model takes {columns} texts at a time, got {len(row)}: {row[0]!r}")
    return rows
