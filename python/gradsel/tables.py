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
        counts[starred(name), key] = counts.get((starred(name), key), 0) + 1
    return [(name + (f"  x{count}" if count > 1 else ""), key, count) for (name, key), count in counts.items()]


def starred(name: str) -> str:
    """A name with its block numbers written as ``*``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def printable(text: str) -> str:
    """Text that may come from a file, without what steers a terminal or hides letters: that is written as escapes.

    Line breaks stay in text that is split into lines first, and in no other.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of left-aligned columns, of printable text."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads) - 1)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in [heads, *rows]
    ]


def shape_text(shape: Sequence[int]) -> str:
    """``768x3072``."""
    return "x".join(map(str, shape)) or "scalar"
