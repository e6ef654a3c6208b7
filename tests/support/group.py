"""Processes that form one group of ranks and run what tests send them.

Importing torch takes seconds, so the processes are forked from a server that has done so, and one group serves all
tests. Every rank runs the same function; what one of them raises fails the test with its traceback.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
#: A rank that waits for another one gives up after this time.
PATIENCE = datetime.timedelta(seconds=60)


class Ranks:
    """A group of processes; see :meth:`run`.

    Args:
        world: number of ranks.
        folder: where they meet.
    """

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.ranks_preloaded"])
        self._broken = False
        self._ends: list[Connection] = []
        self._processes = []
        with importable():
            for rank in range(world):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, world, str(folder), theirs), daemon=True)
                process.start()
                self._ends.append(ours)
                self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``function(*args)`` in every rank.

        Args:
            function: of a module.

        Returns:
            The results by rank.
        """
        assert not self._broken, "an earlier test left ranks waiting for each other"
        for end in self._ends:
            end.send((function, args))
        results: list[Any] = []
        failures: dict[str, list[int]] = {}
        for rank, end in enumerate(self._ends):
            answered = end.poll(2 * PATIENCE.total_seconds())
            failure, result = end.recv() if answered else ("no answer", None)
            if failure is not None:
                failures.setdefault(failure, []).append(rank)
            results.append(result)
        if failures:
            self._broken = any("no answer" in failure or "Timed out" in failure for failure in failures)
            raise AssertionError("\n".join(f"ranks {where}: {failure}" for failure, where in failures.items()))
        return results

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


@contextmanager
def importable() -> Iterator[None]:
    """Lets a server that is started inside import the library and the tests."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(rank: int, world: int, folder: str, end: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=PATIENCE)
    while (task := end.recv()) is not None:
        function, args = task
        torch.manual_seed(0)
        try:
            end.send((None, function(*args)))
        except BaseException:
            end.send((traceback.format_exc(), None))
    dist.destroy_process_group()
