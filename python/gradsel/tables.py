"""Tables as text, with one line for all similar parameters."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def grouped(entries: Iterable[tuple[str, Key]]) -> list[tuple[str, Key, int]]:
    """Merges entries with the same key whose names differ only in block numbers, which are written as ``*``.

    Returns:
        For each: the name, followed by the number of entries if there are several; the key; the number of entries.
    """
    counts: dict[tuple[str, Key], int] = {}
    for name, key in entries:
        starred = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), key)
        counts[starred] = counts.get(starred, 0) + 1
    return [(name + (f"  x{count}" if count > 1 else ""), key, count) for (name, key), count in counts.items()]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of left-aligned columns."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads) - 1)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in [heads, *rows]
    ]


def shape_text(shape: Sequence[int]) -> str:
    """``768x3072``."""
    return "x".join(map(str, shape)) or "scalar"
