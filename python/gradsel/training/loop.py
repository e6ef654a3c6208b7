"""The stages of a run: selection, training by transformers' Trainer, and the test with what it writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from gradsel.attached import is_attached
from gradsel.errors import RunError
from gradsel.methods import Context, Prepared
from gradsel.methods.base import SELECTION
from gradsel.nn.detaching import detach
from gradsel.selection.selection import Selection
from gradsel.training.card import write_card
from gradsel.training.config import Config
from gradsel.training.datasets import SelectionBatches
from gradsel.training.folder import CHECKPOINTS, RESULTS, SECONDS, Log, write_text
from gradsel.training.parts import Parts
from gradsel.training.result import Result
from gradsel.training.saving import last_checkpoint, trained_state
from gradsel.training.seconds import Seconds
from gradsel.training.splits import some
from gradsel.training.trainer import Epochs, StopCleanly, Trainer
from gradsel.training.using import predictions_of


class Stopped(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM, after it had saved what :func:`resume` needs."""


class _Diverged(RunError):
    """The loss or a trained value is no longer a finite number."""

    final = True

    def __init__(self, steps: int, rate: float) -> None:
        super().__init__(
            f"training has diverged: after {steps:,} steps, the loss or a trained value is not a finite number; pass a "
            f"smaller --learning-rate than {rate:g}, or clip the gradient (--max-grad-norm 1)"
        )


class _Finite(TrainerCallback):
    """Stops a run whose loss has become infinite or NaN, which no later step would mend."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise _Diverged(state.global_step, self._rate)


def train(config: Config, folder: Path, parts: Parts, callbacks: Sequence[TrainerCallback], quiet: bool) -> Result:
    processes = parts.processes
    log = Log(folder, quiet, processes.first)
    seconds = Seconds(folder / SECONDS if processes.first else None)
    with seconds.of("all"):
        try:
            prepared, datasets = _prepared(config, folder, parts, log, seconds)
            with processes.watched():
                trainer = _trained(config, folder, parts, prepared, datasets, callbacks, quiet, log, seconds)
                return _finish(config, folder, parts, prepared, datasets, trainer, log, seconds)
        except Stopped:
            raise
        except KeyboardInterrupt:
            log(f"stopped; gradsel resume {folder} goes on")
            raise


def _prepared(
    config: Config, folder: Path, parts: Parts, log: Log, seconds: Seconds
) -> tuple[Prepared, dict[str, Any]]:
    """The model as the method trains it, and the data sets by split."""
    data, loaded, processes = parts.data, parts.loaded, parts.processes
    classes = [f"{len(data.classes)} classes ({some(data.classes, 4)})"] if data.classes else []
    sizes = [f"{len(split.labels):,} {name}" for name, split in data.splits.items()]
    log(f"{config.model.name} on {config.data.path or config.data.task}: {', '.join([*classes, *sizes])}")
    for note in data.notes:
        log(note)
    if processes.count > 1:
        log(f"{processes.count} processes, {parts.batch_size(config)} of the {config.recipe.batch_size} samples of a "
            "batch in each")  # fmt: skip
    cached = folder / SELECTION
    with processes.together():
        datasets, ranking, views = parts.task.datasets(data.splits, loaded, config)
        selection = Selection.load(cached) if cached.exists() else None
    views = views and parts.how.needs_batches
    batches = _selection_batches(config, parts, ranking, views)
    with processes.together(), seconds.of("selection"):
        prepared = _prepare(config, parts, batches, views, selection)
        if processes.first and selection is None and prepared.selection is not None:
            prepared.selection.save(cached)
    if left_out := sum(processes.gather(batches.left_out)):
        log(f"selection left out {left_out} batches in which no two samples share a class")
    log(f"{parts.how}: {prepared.trained:,} of {prepared.total:,} parameters trained ({prepared.share:.3f} %)")
    return prepared, datasets


def _trained(
    config: Config, folder: Path, parts: Parts, prepared: Prepared, datasets: dict[str, Any],
    callbacks: Sequence[TrainerCallback], quiet: bool, log: Log, seconds: Seconds,
) -> Trainer:  # fmt: skip
    trainer, stopping = _trainer(config, folder, parts, prepared, datasets, [*callbacks, seconds], quiet, log)
    checkpoint = parts.processes.from_first(last_checkpoint(folder / CHECKPOINTS))
    if checkpoint is not None:
        log(f"resumed from {checkpoint}")
    try:
        with seconds.of("training"):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        single = RunError(
            "recipe.batch_size: a batch of one sample has one value per channel in a BatchNorm layer, which cannot "
            "normalise it; pass a larger --batch-size, or an --image-size at which more values are left"
        )
        single.final = True
        raise single from error
    finally:
        stopping.release()
    if stopping.stopped and trainer.state.global_step < trainer.state.max_steps:
        log(f"stopped after {trainer.state.global_step:,} of {trainer.state.max_steps:,} steps; "
            f"gradsel resume {folder} goes on")  # fmt: skip
        parts.processes.any(True)  # when the first process ends, launchers kill the others
        raise Stopped
    return trainer


def _selection_batches(config: Config, parts: Parts, dataset: Any, views: bool) -> SelectionBatches:
    pairs = not views and parts.how.options().get("loss") == "contrastive"
    return SelectionBatches(
        dataset, config.recipe.batch_size, parts.task.collate(parts.loaded), parts.device, config.seed,
        config.data.workers, pairs, parts.processes,
    )  # fmt: skip


def _prepare(
    config: Config, parts: Parts, batches: SelectionBatches, views: bool, selection: Selection | None
) -> Prepared:
    processes, how, model = parts.processes, parts.how, parts.loaded.model
    context = Context(
        head=parts.loaded.head, rate=parts.recipe.rate, seed=config.seed, views=views, selection=selection,
        dataset=batches.dataset,
        batches_of=lambda dataset: _selection_batches(config, parts, dataset, views),
        progress=None if processes.first else False, process_group=processes.group,
        parts=parts.loaded.parts, loss=parts.task.selection_loss,
    )  # fmt: skip
    model.eval()  # no dropout, and running statistics stay
    return how.prepare(model, batches if how.needs_batches else None, context)


def _trainer(
    config: Config, folder: Path, parts: Parts, prepared: Prepared, datasets: dict[str, Any],
    callbacks: Sequence[TrainerCallback], quiet: bool, log: Log,
) -> tuple[Trainer, StopCleanly]:  # fmt: skip
    recipe, validation = parts.recipe, datasets.get("validation")
    steps = config.output.save_steps
    every = "epoch" if steps is None else "steps"
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=parts.batch_size(config),
        per_device_eval_batch_size=parts.batch_size(config),
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
        logging_nan_inf_filter=config.precision == "fp16",  # whose scaler skips steps that overflow
        load_best_model_at_end=validation is not None,
        metric_for_best_model=parts.task.metric(config) if validation is not None else None,
        greater_is_better=True if validation is not None else None,
        restore_callback_states_from_checkpoint=True,
        dataloader_num_workers=config.data.workers,
        dataloader_pin_memory=parts.device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=config.output.tracking or "none",
        disable_tqdm=quiet or not os.isatty(2) or not parts.processes.first,
    )
    if _single_left(datasets["train"], parts.batch_size(config), prepared.model) and parts.processes.count == 1:
        arguments.dataloader_drop_last = True
        log("every epoch leaves out one sample, drawn at random: BatchNorm cannot normalise a last batch of one")
    if parts.device.type == "cuda" and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would copy the model at every step
    stopping = StopCleanly(parts.processes.any if parts.processes.count > 1 else None)
    own: list[TrainerCallback] = [Epochs(), _Finite(recipe.rate), stopping]
    if config.recipe.patience is not None:
        own.append(EarlyStoppingCallback(config.recipe.patience))
    trainer = Trainer(
        prepared.model, arguments, parts.task.collate(parts.loaded), datasets["train"], validation,
        compute_metrics=lambda prediction: parts.task.score(prediction, config), callbacks=[*callbacks, *own],
        method=parts.how, recipe=recipe, head=(*parts.loaded.head, *parts.loaded.parts.head),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, stopping


def _single_left(dataset: Any, batch_size: int, model: nn.Module) -> bool:
    """Whether the last batch of an epoch has one sample, and the model a layer of BatchNorm."""
    single = len(dataset) > batch_size > 1 and len(dataset) % batch_size == 1
    return single and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _finish(
    config: Config, folder: Path, parts: Parts, prepared: Prepared, datasets: dict[str, Any], trainer: Trainer,
    log: Log, seconds: Seconds,
) -> Result:  # fmt: skip
    processes, model = parts.processes, prepared.model
    processes.same_buffers(model)
    if not all(bool(tensor.isfinite().all()) for tensor in trained_state(model).values()):
        raise _Diverged(trainer.state.global_step, parts.recipe.rate)
    if processes.first:
        parts.how.save(prepared, folder)
    if is_attached(model):
        detach(model)
    with seconds.of("testing"):
        outputs, labels = predictions_of(config, model, parts.loaded, datasets["test"], parts.device, processes)
    if not processes.first:
        return Result(folder, processes.from_first({}))
    found = parts.task.metrics(outputs, labels, parts.data.classes, config)
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
        "bytes_of_full_model": parts.bytes,
        "processes": processes.count,
        "batch_size": {"all": config.recipe.batch_size, "per_process": parts.batch_size(config)},
        "seconds": {name: round(value, 3) for name, value in seconds.so_far().items()},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if parts.device.type == "cuda" else None,
        "device": str(parts.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "history": [_history(entry) for entry in trainer.state.log_history if "train_loss" not in entry],
    }
    write_card(folder, config, results, parts.task)
    if config.output.report:
        parts.task.report(folder, config, results, parts.data, outputs, labels, prepared.selection)
    write_text(folder / RESULTS, json.dumps(results, ensure_ascii=False, indent=1) + "\n")  # the last: it is finished
    log(", ".join(f"{name} {value}" for name, value in parts.task.rows(found))
        + f" of {found['samples']:,} test samples; {results['bytes']:,} bytes in {folder}")  # fmt: skip
    return Result(folder, processes.from_first(results))


def _history(entry: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the machine's speed."""
    return {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second", "_flos"))}


def result_bytes(folder: Path) -> int:
    """Bytes of the files that hold the result; not of checkpoints, reports and logs."""
    files = [file for file in folder.rglob("*.safetensors") if CHECKPOINTS not in file.relative_to(folder).parts]
    return sum(file.stat().st_size for file in files if file.name != SELECTION)
