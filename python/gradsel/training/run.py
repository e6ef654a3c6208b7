"""finetune(), resume(), evaluate() and predict(): from data and a model to a folder with the result, and back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from gradsel.attached import is_attached
from gradsel.methods import Context, Method, Prepared, method
from gradsel.methods.base import SELECTION
from gradsel.nn.attaching import detach
from gradsel.selection.selection import Selection
from gradsel.training.card import write_card
from gradsel.training.config import Config, PathLike, read_config
from gradsel.training.data import Data, Split, read_data
from gradsel.training.datasets import Images, SelectionBatches, Texts, collate, datasets_of, transforms
from gradsel.training.evaluation import metrics, predictions
from gradsel.training.folder import (
    CONFIG,
    LABELS,
    RESULTS,
    Log,
    read_json,
    require_disk,
    require_new,
    write_text,
)
from gradsel.training.models import Loaded, load_model
from gradsel.training.recipe import Recipe, precision_dtype
from gradsel.training.trainer import Epochs, StopCleanly, Trainer, last_checkpoint

CHECKPOINTS = "checkpoints"


class Stopped(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM, after it had saved what :func:`resume` needs."""


@dataclass(frozen=True)
class Result:
    """What :func:`finetune` returns.

    Attributes:
        folder: where everything lies.
        results: what ``results.json`` says: ``metrics`` of the test set, ``trained``, ``seconds``, ``history``, ...
    """

    folder: Path
    results: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Those of the test set; see :func:`gradsel.training.evaluation.metrics`."""
        found: dict[str, Any] = self.results["metrics"]
        return found


def finetune(config: Config, *, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False) -> Result:
    """Fine-tunes a model on a data set, tests it, and writes a folder with the result.

    Everything is checked before the folder is made. Ctrl-C finishes the step, saves a checkpoint and raises
    :class:`Stopped`; :func:`resume` then goes on as if nothing had happened.

    Args:
        config: see :class:`Config`; ``data.path``, ``model.name`` and ``output.folder`` have no default.
        callbacks: further callbacks of transformers' Trainer.
        quiet: print nothing.

    Raises:
        ValueError: data, model, method, device or folder are not as they must be; the message is one line.
    """
    config.require()
    folder = Path(config.output.folder)
    require_new(folder)
    parts = _load(config)
    require_disk(folder, config, parts.how, parts.loaded.model, parts.loaded.head)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / LABELS, json.dumps(parts.data.classes, ensure_ascii=False, indent=1) + "\n")
    write_text(folder / CONFIG, _portable(config).to_yaml())  # the last, as resume() asks for it
    return _train(config, folder, parts, callbacks, quiet)


def resume(folder: PathLike, *, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False) -> Result:
    """Goes on with a run that was stopped or killed, from its last checkpoint, and ends with the same bits.

    Raises:
        ValueError: the folder has no run, or one that is finished; or the data or the model are not what they were.
    """
    folder, config = _run_in(folder)
    if (folder / RESULTS).exists():
        raise ValueError(f"the run in {folder} is finished; there is nothing to resume")
    parts = _load(config)
    if parts.data.classes != read_json(folder / LABELS):
        raise ValueError(f"data.path: {config.data.path} has other classes than when the run in {folder} began")
    return _train(config, folder, parts, callbacks, quiet)


def evaluate(folder: PathLike, data: PathLike | None = None) -> dict[str, Any]:
    """Tests the result in a folder.

    Args:
        folder: what :func:`finetune` wrote.
        data: other data, in a layout that finetune() takes, with the same classes; their test set counts if they have
            one, else all of them. None: the test set of the run.

    Returns:
        See :func:`gradsel.training.evaluation.metrics`.

    Raises:
        ValueError: the folder has no finished run, or the model or the data do not fit.
    """
    folder, config = _finished(folder)
    classes: list[str] = read_json(folder / LABELS)
    if data is None:
        found = read_data(config.data, config.seed)
        split = found.splits["test"]
    else:
        found = read_data(config.replaced({"data.path": os.fspath(data)}).data, config.seed)
        split = _joined(found)
    if found.classes != classes:
        numbers = {name: number for number, name in enumerate(classes)}
        if strange := [name for name in found.classes if name not in numbers]:
            raise ValueError(f"data: the model knows no class {strange[0]!r} ({len(strange)} are unknown)")
        split = Split(split.inputs, [numbers[found.classes[label]] for label in split.labels])
    model, loaded, device = _loaded_result(folder, config, classes, found.kind)
    return metrics(*_predictions(config, model, loaded, _testing(config, loaded, split), device), classes)


def predict(folder: PathLike, inputs: Sequence[Any], top: int = 3) -> list[list[tuple[str, float]]]:
    """Classifies images or texts.

    Args:
        folder: what :func:`finetune` wrote.
        inputs: paths of images; or texts, or pairs of texts.
        top: how many classes to return.

    Returns:
        For each input the classes with the largest probabilities, the largest first.

    Raises:
        ValueError: the folder has no finished run, an image cannot be read, or a pair of texts is not one.
    """
    folder, config = _finished(folder)
    classes: list[str] = read_json(folder / LABELS)
    results = read_json(folder / RESULTS)
    split = Split(_checked_inputs(inputs, results), [0] * len(inputs))
    if not inputs:
        return []
    model, loaded, device = _loaded_result(folder, config, classes, results["kind"])
    logits, _ = _predictions(config, model, loaded, _testing(config, loaded, split), device)
    probabilities = logits.softmax(1)
    best = probabilities.topk(min(top, len(classes)), dim=1)
    return [
        [(classes[number], float(value)) for value, number in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


# --- Parts -------------------------------------------------------------------------------------------------------


@dataclass
class _Parts:
    data: Data
    how: Method
    recipe: Recipe
    device: torch.device
    loaded: Loaded


def _load(config: Config) -> _Parts:
    """Everything that a run needs, before anything is written; cheap checks come first."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a run has one process so far; start it without torchrun")
    how = method(config.method.name, **config.method.options)
    device = device_of(config)
    Recipe(config.recipe, how, 2)
    data = read_data(config.data, config.seed)
    recipe = Recipe(config.recipe, how, len(data.classes))
    if recipe.mixes and data.kind != "images":
        raise ValueError("recipe.mixup and recipe.cutmix mix images, but the data are texts")
    if config.recipe.patience is not None and "validation" not in data.splits:
        raise ValueError("recipe.patience needs a validation set: a folder or table val beside train and test")
    loaded = load_model(config.model, data.classes, data.kind, config.seed, config.data.image_size)
    loaded.model.to(device)
    return _Parts(data, how, recipe, device, loaded)


def device_of(config: Config) -> torch.device:
    """The device to run on.

    Raises:
        ValueError: there is none such, or it does not have the precision.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("device: cuda was asked for, but torch sees no GPU; pass --device cpu")
    device = torch.device("cpu" if config.device == "cpu" or not available else "cuda")
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision: fp16 needs a GPU; pass bf16 or fp32")
    return device


def _portable(config: Config) -> Config:
    """The same run from any working directory: local paths are absolute."""
    changes = {"data.path": os.path.abspath(config.data.path), "output.folder": os.path.abspath(config.output.folder)}
    if Path(config.model.name).is_dir():
        changes["model.name"] = os.path.abspath(config.model.name)
    return config.replaced(changes)


def _run_in(folder: PathLike) -> tuple[Path, Config]:
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no run of gradsel: there is no {CONFIG} in it")
    return folder, read_config(folder / CONFIG)


def _finished(folder: PathLike) -> tuple[Path, Config]:
    folder, config = _run_in(folder)
    if not (folder / RESULTS).is_file():
        raise ValueError(f"the run in {folder} is not finished; gradsel resume {folder} goes on with it")
    return folder, config


def _loaded_result(
    folder: Path, config: Config, classes: list[str], kind: str
) -> tuple[nn.Module, Loaded, torch.device]:
    device = device_of(config.replaced({"device": "auto"}) if config.device == "cuda" else config)
    loaded = load_model(config.model, classes, kind, config.seed, config.data.image_size)
    model = method(config.method.name, **config.method.options).load(loaded.model, folder)
    return model.to(device), loaded, device


def _testing(config: Config, loaded: Loaded, split: Split) -> Any:
    if loaded.tokenizer is not None:
        return Texts(split, loaded.tokenizer, min(config.data.max_length, loaded.positions))
    assert loaded.image is not None
    return Images(split, transforms(loaded.image, config.data.augmentation)[1], config.seed)


def _predictions(
    config: Config, model: nn.Module, loaded: Loaded, dataset: Any, device: torch.device
) -> tuple[Tensor, Tensor]:
    return predictions(
        model, dataset, collate(loaded), batch_size=config.recipe.batch_size, device=device,
        dtype=precision_dtype(config.precision), workers=config.data.workers,
    )  # fmt: skip


def _joined(data: Data) -> Split:
    """The test set of other data; all of them if it was only held out."""
    if not any("held out" in note for note in data.notes):
        return data.splits["test"]
    parts = list(data.splits.values())
    return Split([x for part in parts for x in part.inputs], [y for part in parts for y in part.labels])


def _checked_inputs(inputs: Sequence[Any], results: dict[str, Any]) -> list[Any]:
    if results["kind"] == "images":
        for path in inputs:
            if not Path(path).is_file():
                raise ValueError(f"there is no image {path}")
        return [os.fspath(path) for path in inputs]
    columns = results["texts"]
    rows = [(each,) if isinstance(each, str) else tuple(each) for each in inputs]
    for row in rows:
        if len(row) != columns:
            raise ValueError(f"the model takes {columns} texts at a time, got {len(row)}: {row[0]!r}")
    return rows


# --- Training ----------------------------------------------------------------------------------------------------


def _train(config: Config, folder: Path, parts: _Parts, callbacks: Sequence[TrainerCallback], quiet: bool) -> Result:
    log = Log(folder, quiet)
    started = time.perf_counter()
    data, loaded = parts.data, parts.loaded
    log(f"{config.model.name} on {config.data.path}: {len(data.classes)} classes, "
        + ", ".join(f"{len(split.labels):,} {name}" for name, split in data.splits.items()))  # fmt: skip
    for note in data.notes:
        log(note)
    datasets, ranking, views = datasets_of(data.splits, loaded, config.data, config.seed)
    seconds: dict[str, float] = {}
    prepared = _prepare(config, folder, parts, ranking, views, log, seconds)
    log(f"{parts.how}: {prepared.trained:,} of {prepared.total:,} parameters trained ({prepared.share:.3f} %)")

    trainer, stopping = _trainer(config, folder, parts, prepared, datasets, callbacks, quiet)
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint is not None:
        log(f"resumed from {checkpoint}")
    before = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        stopping.release()
    seconds["training"] = time.perf_counter() - before
    if stopping.stopped and trainer.state.global_step < trainer.state.max_steps:
        log(f"stopped after {trainer.state.global_step:,} of {trainer.state.max_steps:,} steps; "
            f"gradsel resume {folder} goes on")  # fmt: skip
        raise Stopped
    return _finish(config, folder, parts, prepared, datasets, trainer, log, seconds, started)


def _prepare(
    config: Config, folder: Path, parts: _Parts, ranking: Any, views: bool, log: Log, seconds: dict[str, float]
) -> Prepared:
    how, model, cached = parts.how, parts.loaded.model, folder / SELECTION
    views = views and how.needs_batches

    def batches_of(dataset: Any) -> SelectionBatches:
        pairs = not views and how.options().get("loss") == "contrastive"
        return SelectionBatches(
            dataset, config.recipe.batch_size, collate(parts.loaded), parts.device, config.seed, config.data.workers,
            pairs,
        )  # fmt: skip

    selection = Selection.load(cached) if cached.exists() else None
    batches = batches_of(ranking)
    context = Context(
        head=parts.loaded.head, seed=config.seed, views=views, selection=selection, dataset=ranking,
        batches_of=batches_of, progress=None,
    )  # fmt: skip
    model.eval()  # no dropout, and running statistics stay
    before = time.perf_counter()
    prepared = how.prepare(model, batches if how.needs_batches else None, context)
    seconds["selection"] = time.perf_counter() - before
    if batches.left_out:
        log(f"selection left out {batches.left_out} batches in which no two samples share a class")
    if selection is None and prepared.selection is not None:
        prepared.selection.save(cached)
    return prepared


def _trainer(
    config: Config, folder: Path, parts: _Parts, prepared: Prepared, datasets: dict[str, Any],
    callbacks: Sequence[TrainerCallback], quiet: bool,
) -> tuple[Trainer, StopCleanly]:  # fmt: skip
    recipe, validation = parts.recipe, datasets.get("validation")
    steps = config.output.save_steps
    every = "epoch" if steps is None else "steps"
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=config.recipe.batch_size,
        per_device_eval_batch_size=config.recipe.batch_size,
        gradient_accumulation_steps=config.recipe.accumulation,
        learning_rate=recipe.rate,
        max_grad_norm=config.recipe.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        use_cpu=parts.device.type == "cpu",
        seed=config.seed,
        save_strategy=every,
        save_steps=steps or 500,
        save_total_limit=config.output.keep,
        eval_strategy="no" if validation is None else every,
        eval_steps=steps,
        logging_strategy="epoch",
        load_best_model_at_end=validation is not None,
        metric_for_best_model="top1" if validation is not None else None,
        greater_is_better=True if validation is not None else None,
        restore_callback_states_from_checkpoint=True,
        dataloader_num_workers=config.data.workers,
        dataloader_pin_memory=parts.device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=config.output.tracking or "none",
        disable_tqdm=quiet or not os.isatty(2),
    )
    if parts.device.type == "cuda" and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would copy the model at every step
    stopping = StopCleanly()
    own: list[TrainerCallback] = [Epochs(), stopping]
    if config.recipe.patience is not None:
        own.append(EarlyStoppingCallback(config.recipe.patience))
    trainer = Trainer(
        prepared.model, arguments, collate(parts.loaded), datasets["train"], validation,
        compute_metrics=_top1, callbacks=[*callbacks, *own], method=parts.how, recipe=recipe,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, stopping


def _top1(prediction: Any) -> dict[str, float]:
    return {"top1": 100 * float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def _finish(
    config: Config, folder: Path, parts: _Parts, prepared: Prepared, datasets: dict[str, Any], trainer: Trainer,
    log: Log, seconds: dict[str, float], started: float,
) -> Result:  # fmt: skip
    parts.how.save(prepared, folder)
    model = prepared.model
    if is_attached(model):
        detach(model)
    before = time.perf_counter()
    logits, labels = _predictions(config, model, parts.loaded, datasets["test"], parts.device)
    seconds["testing"] = time.perf_counter() - before
    seconds["all"] = time.perf_counter() - started
    found = metrics(logits, labels, parts.data.classes)
    results: dict[str, Any] = {
        "metrics": found,
        "kind": parts.data.kind,
        "texts": len(parts.data.splits["train"].inputs[0]) if parts.data.kind == "texts" else None,
        "model": config.model.name,
        "method": {"name": parts.how.name, **parts.how.options()},
        "trained": prepared.trained,
        "parameters": prepared.total,
        "share": prepared.share,
        "classes": len(parts.data.classes),
        "samples": {name: len(split.labels) for name, split in parts.data.splits.items()},
        "steps": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_global_step if "validation" in datasets else None,
        "bytes": result_bytes(folder),
        "bytes_of_full_model": sum(tensor.nbytes for tensor in parts.loaded.model.state_dict().values()),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if parts.device.type == "cuda" else None,
        "device": str(parts.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "history": [_history(entry) for entry in trainer.state.log_history if "train_loss" not in entry],
    }
    write_card(folder, config, results)
    if config.output.report:
        from gradsel.training.report import write_report

        write_report(folder, config, results, parts.data, logits, labels, prepared.selection)
    write_text(folder / RESULTS, json.dumps(results, ensure_ascii=False, indent=1) + "\n")  # the last: it is finished
    log(f"top-1 {found['top1']:.2f} %" + (f", top-5 {found['top5']:.2f} %" if "top5" in found else "")
        + f" of {found['samples']:,} test samples; {results['bytes']:,} bytes in {folder}")  # fmt: skip
    return Result(folder, results)


def _history(entry: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the machine's speed."""
    return {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second", "_flos"))}


def result_bytes(folder: Path) -> int:
    """Bytes of the files that hold the result; not of checkpoints, reports and logs."""
    files = [file for file in folder.rglob("*.safetensors") if CHECKPOINTS not in file.relative_to(folder).parts]
    return sum(file.stat().st_size for file in files if file.name != SELECTION)
