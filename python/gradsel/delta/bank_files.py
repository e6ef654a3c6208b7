"""The tasks of a bank in a folder: a delta each, and an index that says which file is which task."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradsel.delta.delta import Delta
from gradsel.files import replacing_all

INDEX = "bank.json"
_FORMAT, _VERSION = "gradsel.bank", "1"
#: Names that :func:`_file_of` gives; no others are ever removed, whatever an index says.
_OURS = r"[A-Za-z0-9_-]*-[0-9a-f]{12}\.delta"


def save(folder: Path, tasks: Mapping[str, Delta]) -> None:
    """See ``TaskBank.save``."""
    folder.mkdir(parents=True, exist_ok=True)
    old: set[str] = set()
    with suppress(ValueError, OSError):
        old = {path.name for path in tasks_in(folder).values() if re.fullmatch(_OURS, path.name)}
    files = {name: _file_of(name) for name in tasks}
    index = {"format": _FORMAT, "version": _VERSION, "tasks": files}
    with replacing_all([*(folder / file for file in files.values()), folder / INDEX]) as unfinished:
        for delta, path in zip(tasks.values(), unfinished, strict=False):
            delta.save(path, force=True)  # what is in the bank was accepted before
        unfinished[-1].write_text(json.dumps(index, indent=2) + "\n")
    for file in old - set(files.values()):
        (folder / file).unlink(missing_ok=True)


def tasks_in(folder: Path) -> dict[str, Path]:
    """The files of the tasks, by name, in the order in which they were added.

    Raises:
        ValueError: the folder has no index, or one that is damaged, of a later version, or names other folders.
    """
    try:
        index: Any = json.loads((folder / INDEX).read_text())
        if index["format"] != _FORMAT:
            raise ValueError(f"its format is {index['format']!r}, expected {_FORMAT!r}")
        if index["version"] != _VERSION:
            raise ValueError(f"it is of version {index['version']}, this library reads {_VERSION}; update it")
        files = dict(index["tasks"])
        if any(not isinstance(file, str) or Path(file).name != file for file in files.values()):
            raise ValueError("tasks must be files in the same folder")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} has no readable {INDEX} of a bank: {error}") from None
    return {name: folder / file for name, file in files.items()}


def _file_of(task: str) -> str:
    """A file name that shows the task's, and is no other task's."""
    short = re.sub(r"[^A-Za-z0-9-]+", "_", task)[:60]
    return f"{short}-{hashlib.blake2b(task.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}.delta"
