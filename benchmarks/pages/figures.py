"""How the documentation looks up measured figures and writes them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness.results import Row, latest, load

WIDTH = 120
_UNBROKEN = re.compile(r"`[^`]*`|\[[^\]]*\]\([^)]*\)| %|[A-Za-z] = \d+")
_SPACE = "\0"

# --- Rows --------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[Row]:
    """The rows of the machine that measured last."""
    return latest(load(path))


def where(rows: Sequence[Row]) -> str:
    """With what and when some rows were measured, from their own columns."""
    first, dates = rows[0], sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{first['device']}, {counted(int(first['threads']), 'thread')}, torch {first['torch']}, {when}"


class Medians:
    """The medians in ``cpu.csv``, looked up by kernel, size, dtype, K and provider."""

    def __init__(self, results: Path) -> None:
        self.path = results / "cpu.csv"
        self.rows = rows_of(self.path)
        self._found = {self._key(row): row for row in self.rows}

    @staticmethod
    def _key(row: Row) -> tuple[str, str, str, int, str]:
        return row["kernel"], row["size"], row["dtype"], int(row["k"]), row["provider"]

    def row(self, kernel: str, size: str, k: int, provider: str, dtype: str = "float32") -> Row:
        key = (kernel, size, dtype, k, provider)
        if key not in self._found:
            raise ValueError(f"{self.path.name} has no row {', '.join(map(str, key))}; measure it by make bench")
        return self._found[key]

    def ms(self, kernel: str, size: str, k: int, provider: str, dtype: str = "float32") -> float:
        return float(self.row(kernel, size, k, provider, dtype)["p50_us"]) / 1000

    def ks(self, kernel: str, size: str, provider: str, dtype: str = "float32") -> list[int]:
        """Every K above 0 for which a provider was measured."""
        return sorted(key[3] for key in self._found if (*key[:3], key[4]) == (kernel, size, dtype, provider) and key[3])


# --- Numbers -----------------------------------------------------------------------------------------------------


def duration(milliseconds: float) -> str:
    """A time with two or three digits and its unit."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    decimals = 3 if milliseconds < 0.0995 else 2 if milliseconds < 0.995 else 1 if milliseconds < 9.95 else 0
    return f"{milliseconds:.{decimals}f} ms"


def megabytes(count: float) -> str:
    """Without the unit, which the head of the column has."""
    value = count / 1e6
    if not value:
        return "0"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def multiple(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- Markdown ----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """An empty cell is one space."""
    rule = f"|{'---|' * len(head)}"
    first, *others = ("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (head, *lines))
    return "\n".join([first, rule, *others])


def paragraph(text: str, first: str = "", others: str = "") -> str:
    """Wrapped to WIDTH. Code, links and percentages are not broken."""
    kept = _UNBROKEN.sub(lambda match: match[0].replace(" ", _SPACE), text)
    lines = textwrap.wrap(
        kept, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_SPACE, " ")


def bullets(texts: Iterable[str]) -> str:
    return "\n".join(paragraph(text, "- ", "  ") for text in texts)
