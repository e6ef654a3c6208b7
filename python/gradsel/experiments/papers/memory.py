"""Memory over time while a model trains."""

from __future__ import annotations

import csv
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from gradsel.errors import RunError


class MemoryOverTime(TrainerCallback):
    """Writes a line after every step: its number, seconds since the first, bytes in use.

    On a GPU bytes are what torch has reserved, which is about what the driver shows; on a CPU the resident memory of
    the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = 0.0
        if self._path.is_file():  # a run that was stopped goes on
            before = max((seconds for _, seconds, _ in self._read()), default=0.0)
        else:
            self._path.write_text("step,seconds,bytes\n", encoding="utf-8")
        self._began = time.perf_counter() - before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._began
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{state.global_step},{seconds:.4f},{_in_use()}\n")

    def rows(self) -> list[tuple[int, float, int]]:
        """What was written: step, seconds, bytes.

        Raises:
            RunError: there is nothing, as the run was finished before it was measured.
        """
        rows = self._read() if self._path.is_file() else []
        if not rows:
            raise RunError(f"{self._path} has no steps, as the run beside it ended without it; remove both")
        return rows

    def _read(self) -> list[tuple[int, float, int]]:
        with self._path.open(newline="", encoding="utf-8") as file:
            return [(int(row["step"]), float(row["seconds"]), int(row["bytes"])) for row in csv.DictReader(file)]


def _in_use() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the most so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
