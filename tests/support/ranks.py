"""Runs in processes of their own, alone or as the ranks of one run, forked from a server that has imported everything.

Importing torch, transformers and timm takes many times as long as a run of a tiny model.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.group import importable

SECONDS = 120


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: exit code; minus the number of the signal that killed it.
        printed: what it wrote to standard output and standard error.
    """

    code: int
    printed: str


def run(argv: Sequence[str], folder: Path, count: int = 2, **trouble: Any) -> list[Ended]:
    """Runs a command of ``gradsel`` in processes that find the environment of ``torchrun``; waits for all.

    Args:
        argv: the command's arguments.
        folder: for what the processes print.
        count: of processes; with 1 there is no sign of a launcher.
        trouble: what goes wrong, see :func:`_with`.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.support.ranks_preloaded"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, files = [], []
    with importable():
        for rank in range(count):
            files.append(folder / f"printed-{rank}-{port}.txt")
            environment = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": port}  # fmt: skip
            given = (list(argv), str(files[-1]), environment if count > 1 else {}, trouble)
            processes.append(server.Process(target=_main, args=given, daemon=True))
            processes[-1].start()
    for process in processes:
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [Ended(process.exitcode, file.read_text()) for process, file in zip(processes, files, strict=True)]


def _main(argv: list[str], file: str, environment: dict[str, Any], trouble: dict[str, Any]) -> None:
    import torch

    from gradsel.cli.main import main

    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with open(file, "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        _with(int(environment.get("RANK", 0)), **trouble)
        try:
            code = main(argv)
        except BaseException:
            traceback.print_exc()
            code = 70
    sys.stdout.flush()
    os._exit(code) if code == 70 else sys.exit(code)


def _with(rank: int, of: int = 0, at: int = 0, what: str = "") -> None:
    """Lets one rank meet trouble.

    Args:
        of: which rank.
        at: the step of training after which it happens.
        what: ``"SIGKILL"`` or another signal, which it sends to itself; ``"bug"``, an error in training; or ``"data"``,
            data that this rank cannot read.
    """
    if not what or rank != of:
        return
    from gradsel.training import classification, trainer

    if what == "data":

        def unreadable(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("data: this machine has none")

        classification.read_data = unreadable
        return

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == at:
            if what == "bug":
                raise ValueError("a bug")
            os.kill(os.getpid(), signal.Signals[what])

    trainer.Epochs.on_step_end = on_step_end
