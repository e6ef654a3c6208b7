"""finetune() and resume(): from data and a model to a folder with the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_callback import TrainerCallback

from gradsel.errors import RunError, expected
from gradsel.methods.base import SELECTION
from gradsel.training.changed import changes, fingerprint
from gradsel.training.checkpoints import require_whole
from gradsel.training.config import CONFIG, Config, PathLike, run_in
from gradsel.training.folder import (
    CHECKPOINTS,
    DATA,
    LABELS,
    RESULTS,
    read_labels,
    require_disk,
    require_new,
    write_text,
)
from gradsel.training.loop import Stopped, train
from gradsel.training.parts import load_parts, portable
from gradsel.training.processes import join, require_count
from gradsel.training.result import Result
from gradsel.training.saving import last_checkpoint

__all__ = ["Stopped", "finetune", "resume"]


def finetune(config: Config, *, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False) -> Result:
    """Fine-tunes a model on a data set, tests it, and writes a folder with the result.

    Everything is checked before the folder is made. Ctrl-C finishes the step, saves a checkpoint and raises
    :class:`Stopped`; :func:`resume` then goes on as if nothing had happened. Under ``torchrun`` or ``accelerate
    launch`` the processes share every batch, rank 0 writes, and all return the same result.

    Args:
        config: see :class:`Config`; ``data.path``, ``model.name`` and ``output.folder`` have no default.
        callbacks: further callbacks of transformers' Trainer.
        quiet: print nothing.

    Raises:
        RunError: data, model, method, device or folder are not as they must be; the message is one line, and nothing
            is written.
        OtherRankFailed: another process has raised such an error.
    """
    if not isinstance(config, Config):
        raise RunError(
            f"config must be a Config, got {type(config).__name__}; Config.from_dict(...) makes one of a dict"
        )
    with expected():
        config.require()
    processes = join(config.device)
    folder = Path(config.output.folder)
    with processes.together():
        if processes.first:
            require_new(folder)
        parts = load_parts(config, processes)
        if processes.first:
            require_disk(folder, config, parts.how, parts.loaded)
    existed = folder.exists()
    with processes.together():
        if processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / LABELS, json.dumps(parts.data.classes, ensure_ascii=False, indent=1) + "\n")
            write_text(folder / DATA, json.dumps(fingerprint(parts.data, config.data.path), indent=1) + "\n")
            write_text(folder / CONFIG, portable(config).to_yaml())  # the last, as resume() asks for it
    try:
        return train(config, folder, parts, callbacks, quiet)
    except RunError as error:
        selected = (folder / SELECTION).exists() and not error.final
        if selected or last_checkpoint(folder / CHECKPOINTS) is not None:
            _tell_what_is_left(error, folder)
        elif processes.first:
            # Nothing is worth resuming.
            for each in list(folder.iterdir()):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
            if not existed:
                folder.rmdir()
        raise


def _tell_what_is_left(error: RunError, folder: Path) -> None:
    """Adds to the message what a run that failed has written, and what can be done with it."""
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    kept = [] if checkpoint is None else [f"checkpoints up to step {checkpoint.name.rpartition('-')[2]}"]
    kept += ["its selection"] if (folder / SELECTION).exists() else []
    then = (
        "resuming would end in the same way, so begin anew with another --output, or remove the folder"
        if error.final
        else f"gradsel resume {folder} goes on from there"
    )
    error.args = (f"{error}. {folder} keeps {' and '.join([*kept, 'the log'])} of this run; {then}",)


def resume(folder: PathLike, *, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False) -> Result:
    """Goes on with a run that was stopped or killed, from its last checkpoint, and ends with the same bits.

    Raises:
        RunError: the folder has no run, or one that is finished; its last checkpoint is damaged; the data, the model or
            the number of processes are not what they were.
        OtherRankFailed: another process has raised such an error.
    """
    with expected():
        folder, config = run_in(folder)
    processes = join(config.device)
    with processes.together():
        if (folder / RESULTS).exists():
            raise RunError(f"the run in {folder} is finished; there is nothing to resume")
        parts = load_parts(config, processes)
        if parts.data.classes != read_labels(folder):
            raise RunError(f"data.path: {config.data.path} has other classes than when the run in {folder} began")
        if told := changes(folder, parts.data, config.data.path):
            raise RunError(
                f"data.path: {config.data.path} has changed since the run in {folder} began: {told}; put the data "
                "back, or begin anew with another --output"
            )
        if (checkpoint := last_checkpoint(folder / CHECKPOINTS)) is not None:
            require_whole(checkpoint)
            require_count(checkpoint, processes.count)
    try:
        return train(config, folder, parts, callbacks, quiet)
    except RunError as error:
        _tell_what_is_left(error, folder)
        raise
