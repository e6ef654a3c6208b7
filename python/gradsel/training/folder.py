"""The folder of a run: what it is called, whether it may be written, and its log."""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from gradsel.methods import Method
from gradsel.training.config import CONFIG, Config
from gradsel.training.costs import size
from gradsel.training.models import Loaded

LABELS, RESULTS, LOG = "labels.json", "results.json", "log.txt"
CHECKPOINTS, SECONDS, DATA = "checkpoints", "seconds.json", "data.json"
#: Bytes of a trained scalar in a checkpoint: its value and two moments; then room for an index.
_BYTES = 16


def require_new(folder: Path) -> None:
    """Refuses a folder that has something in it, or cannot be made.

    Raises:
        ValueError: see above.
    """
    if folder.is_file():
        raise ValueError(f"output.folder: {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        hint = f"; gradsel resume {folder} goes on with the run in it" if (folder / CONFIG).exists() else ""
        raise ValueError(f"output.folder: {folder} exists and is not empty{hint}")
    parent = _existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(
            f"output.folder: {folder} cannot be made, because {parent} is not a folder that may be written"
        )


def require_disk(folder: Path, config: Config, how: Method, loaded: Loaded) -> None:
    """Refuses to begin what would not fit on the disk.

    Raises:
        ValueError: the free space is less than checkpoints and result need.
    """
    needed = (config.output.keep + 3) * _BYTES * how.trained_on(loaded.model, loaded.head, loaded.parts) + 2**20
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ValueError(
            f"output.folder: checkpoints and result need about {size(needed)}, but the disk of {folder} has "
            f"{size(free)} left; keep fewer checkpoints (--keep) or write elsewhere"
        )


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole, or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def read_json(path: Path) -> Any:
    """Reads a file of a run.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_labels(folder: Path) -> list[str]:
    """The names of the classes.

    Raises:
        ValueError: they are missing or damaged.
    """
    found = read_json(folder / LABELS)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{folder / LABELS} is damaged: it is no list of names")
    return found


def read_results(folder: Path) -> dict[str, Any]:
    """What a finished run has written last.

    Raises:
        ValueError: it is missing or damaged.
    """
    found = read_json(folder / RESULTS)
    if not isinstance(found, dict) or not {"kind", "metrics"} <= found.keys():
        raise ValueError(f"{folder / RESULTS} is damaged: it lacks what gradsel finetune writes")
    return found


class Log:
    """Lines with the time, in a file and, unless quiet, on standard error; of rank 0 only."""

    def __init__(self, folder: Path, quiet: bool, first: bool = True) -> None:
        self._path, self._quiet, self._first = folder / LOG, quiet, first

    def __call__(self, line: str) -> None:
        if not self._first:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        if not self._quiet:
            print(line, file=sys.stderr)
