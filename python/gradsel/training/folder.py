"""The folder of a run: what it is called, whether it may be written, and its log."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from gradsel.methods import Method
from gradsel.methods.dense import Full, Lora
from gradsel.methods.selected import Ranked
from gradsel.parameters.names import named_parameters
from gradsel.parameters.rules import parameter_rules, ranked_sizes
from gradsel.training.config import Config

CONFIG, LABELS, RESULTS, LOG = "config.yaml", "labels.json", "results.json", "log.txt"
#: Bytes of a trained scalar in a checkpoint: its value and two moments; then room for an index.
_BYTES = 16


def require_new(folder: Path) -> None:
    """Refuses a folder that has something in it, or cannot be made.

    Raises:
        ValueError: see above.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        hint = f"; gradsel resume {folder} goes on with the run in it" if (folder / CONFIG).exists() else ""
        raise ValueError(f"output.folder: {folder} exists and is not empty{hint}")
    parent = _existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(
            f"output.folder: {folder} cannot be made, because {parent} is not a folder that may be written"
        )


def require_disk(folder: Path, config: Config, how: Method, model: nn.Module, head: Iterable[str]) -> None:
    """Refuses to begin what would not fit on the disk.

    Raises:
        ValueError: the free space is less than checkpoints and result need.
    """
    needed = (config.output.keep + 3) * _BYTES * trained_about(how, model, head) + 2**20
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ValueError(
            f"output.folder: checkpoints and result need about {needed / 1e9:.1f} GB, but the disk of {folder} has "
            f"{free / 1e9:.1f} GB left; keep fewer checkpoints (--keep) or write elsewhere"
        )


def trained_about(how: Method, model: nn.Module, head: Iterable[str]) -> int:
    """About how many scalars a method will train, before anything is ranked."""
    parameters = named_parameters(model)
    if isinstance(how, Full):
        return sum(parameter.numel() for parameter in parameters.values())
    sizes = ranked_sizes(model, head=head)
    rules = parameter_rules(model, head=head)
    whole = sum(parameters[name].numel() for name, rule in rules.items() if rule.action == "whole")
    if isinstance(how, Ranked):
        return whole + how.policy().budget(sizes.values())
    if isinstance(how, Lora):
        return whole + how.rank * sum(rows + cols for rows, cols in sizes.values())
    return whole


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


class Log:
    """Lines with the time, in a file and, unless quiet, on standard error."""

    def __init__(self, folder: Path, quiet: bool) -> None:
        self._path, self._quiet = folder / LOG, quiet

    def __call__(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        if not self._quiet:
            print(line, file=sys.stderr)
