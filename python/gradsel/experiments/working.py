"""Runs, one after another in this process, or several at a time in processes of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from gradsel.errors import RunError, expected, one_line
from gradsel.methods import method
from gradsel.training.config import CONFIG, Config, read_config
from gradsel.training.folder import RESULTS, read_json
from gradsel.training.run import finetune, resume

#: Begins a run; what it returns gives the results, or raises what the run raised.
Start = Callable[[Config], Callable[[], dict[str, Any]]]


def run_or_continue(config: Config, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """The results of a run, which is begun, continued or read, whichever it needs.

    Args:
        callbacks: of transformers' Trainer.

    Raises:
        ValueError: its folder has a run of another method or with another recipe, or memory does not suffice.
    """
    try:
        return _run_or_continue(config, callbacks)
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory: {one_line(error)}") from None


def _run_or_continue(config: Config, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    folder = Path(config.output.folder)
    if (folder / CONFIG).is_file():
        with expected():
            before = read_config(folder / CONFIG)
        if before.recipe != config.recipe:
            raise RunError(f"the run in {folder} was begun with another recipe; remove it to begin anew")
        if before.seed != config.seed or _method_of(before) != _method_of(config):
            raise RunError(f"the run in {folder} was begun with another method or seed; remove it to begin anew")
        if (folder / RESULTS).is_file():
            found: dict[str, Any] = read_json(folder / RESULTS)
            return found
        return resume(folder, callbacks=callbacks, quiet=True).results
    if folder.exists():  # stopped before it had begun
        shutil.rmtree(folder)
    return finetune(config, callbacks=callbacks, quiet=True).results


def _method_of(config: Config) -> tuple[str, dict[str, Any]]:
    """Its name and all options, also those that a config from before they existed does not have."""
    return config.method.name, method(config.method.name, **config.method.options).options()


@contextmanager
def workers(jobs: int) -> Iterator[Start]:
    """What starts runs: in this process when their results are asked for, or in up to ``jobs`` other ones at once.

    The other processes use as many threads as this one, since the number of threads decides the order in which torch
    adds, so a run gives the same bits wherever it runs. When the block ends by an error, runs that have not begun are
    dropped.

    Args:
        jobs: 1: no other processes.
    """
    if jobs == 1:
        yield lambda config: lambda: run_or_continue(config)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (torch.get_num_threads(),)) as pool:

        def start(config: Config) -> Callable[[], dict[str, Any]]:
            running = pool.submit(_worked, config)
            return lambda: _result(running)

        try:
            yield start
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int) -> None:
    """Prepares a worker, which ends with its parent, however that ends: nobody would read its results."""
    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _worked(config: Config) -> dict[str, Any] | str:
    """In a worker: the results, or the message of what does not fit, as not every exception can be sent."""
    try:
        return run_or_continue(config)
    except ValueError as error:
        return one_line(error)


def _result(running: Future[dict[str, Any] | str]) -> dict[str, Any]:
    try:
        found = running.result()
    except BrokenProcessPool:
        raise RunError("a process of --jobs was killed, as by a system that lacks memory; pass fewer --jobs") from None
    if isinstance(found, str):
        raise RunError(found)
    return found
