"""How long the parts of a run took, those before it was stopped and resumed included."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from gradsel.training.folder import write_text


class Seconds(TrainerCallback):
    """Adds up seconds by part, in a file that is written at every checkpoint.

    What a killed run did after its last checkpoint is lost and done again, so its time does not count.

    Args:
        path: of the file; None: keep nothing, as on ranks other than 0.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._running: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        if path is not None and path.exists():
            self._parts = json.loads(path.read_text(encoding="utf-8"))

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts the time in the block, also if it ends by an error."""
        self._running[part] = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self.so_far()[part]
            del self._running[part]
            self._write()

    def so_far(self) -> dict[str, float]:
        """Seconds by part, up to now."""
        now = time.perf_counter()
        running = {part: self._parts.get(part, 0.0) + now - start for part, start in self._running.items()}
        return {**self._parts, **running}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_text(self._path, json.dumps({part: round(value, 3) for part, value in self.so_far().items()}))
