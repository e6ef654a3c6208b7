"""Whether the data under a path are still those that a run began with: a count and a hash of every split."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gradsel.training.data import Data
from gradsel.training.folder import DATA, read_json

#: By split, the number of its samples and a hash.
Fingerprint = dict[str, dict[str, Any]]
#: How much of a file is read, at its beginning and at its end.
_BYTES = 4096


def fingerprint(data: Data, path: str) -> Fingerprint:
    """What changes with the data: texts, labels, names of classes, and names, sizes, beginnings and ends of files.

    Of images inside a table or in a data set of a library, only the number and the labels count.

    Args:
        path: of the data; files are named relative to it, so that the way in which it was written does not matter.
    """
    return {
        name: {
            "samples": len(split.labels),
            "sha256": hashlib.sha256(
                json.dumps([data.classes, *([_of(each, path) for each in part] for part in split)]).encode()
            ).hexdigest(),
        }
        for name, split in data.splits.items()
    }


def _of(given: Any, path: str) -> Any:
    """A label, texts, or the name, size, beginning and end of a file."""
    if not isinstance(given, str):
        return str(given) if hasattr(given, "open") else given
    with open(given, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        begins = zlib.crc32(file.read(_BYTES))
        file.seek(max(size - _BYTES, 0))
        name = os.path.relpath(given, path) if os.path.exists(path) else os.path.basename(given)  # of a library
        return [name, size, begins, zlib.crc32(file.read())]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What has changed, to follow the name of the data; empty if nothing has."""
    told = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if not old or not new:
            told.append(f"there is {'a' if new else 'no'} {name} set now")
        elif old["samples"] != new["samples"]:
            told.append(f"the {name} set has {new['samples']:,} samples, and had {old['samples']:,}")
        else:
            told.append(
                f"the {name} set has as many samples as before ({new['samples']:,}), but files, texts or labels differ"
            )
    return "; ".join(told)


def changes(folder: Path, data: Data, path: str, splits: Collection[str] = ("train", "validation", "test")) -> str:
    """What has changed since the run in a folder began; empty if nothing has, or if an older version began it.

    Args:
        path: of the data.
        splits: those that matter.

    Raises:
        ValueError: what was written down is damaged.
    """
    if not (folder / DATA).is_file():
        return ""
    before = read_json(folder / DATA)
    if not isinstance(before, dict) or not all(
        isinstance(each, dict) and "samples" in each for each in before.values()
    ):
        raise ValueError(f"{folder / DATA} is damaged: it does not say how many samples each split has")
    now = fingerprint(data, path)
    return difference(*({name: found[name] for name in splits if name in found} for found in (before, now)))
