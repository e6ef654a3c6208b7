"""Tables of what is in the results. Those of a GPU run are short, because only its last screens may be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.harness.results import Row, failed
from gradsel.experiments.cost.timing import ERROR


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells), default=0))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in cells
    ]


def number(text: str, digits: int = 3) -> str:
    """As short as it can be said."""
    if not text:
        return "-"
    value = float(text)
    return f"{value:.0f}" if value >= 1000 else f"{value:.{digits}g}"


def over_k(rows: Sequence[Row], line: Callable[[Row], str | None], cell: Callable[[Row], str], head: str) -> list[str]:
    """One line for each name that ``line`` returns (rows with None are left out), one column for each K."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name = line(row)
        if name is not None:
            lines.setdefault(name, {})[row["k"]] = "error" if failed(row) else cell(row)
    ks = sorted({k for found in lines.values() for k in found}, key=lambda k: (len(k), k))
    if not lines:
        return []
    heads = [head, *(f"K={k}" if k else "" for k in ks)]
    return aligned([heads, *([name, *(found.get(k, "") for k in ks)] for name, found in lines.items())])


def errors(rows: Sequence[Row], most: int = 6) -> list[str]:
    """Every different error once, with the number of places where it happened and one of them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if failed(row):
            place = " ".join(row[name] for name in ("provider", "operation", "size", "dtype") if row[name])
            place += f" K={row['k']}" if row["k"] else ""
            found.setdefault(row["extra"].removeprefix(ERROR), []).append(place)
    lines = [
        f"  error, {len(places)}x: {text[:150]} ({places[0]})"
        for text, places in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return lines[:most] + ([f"  and {len(lines) - most} other errors"] if len(lines) > most else [])


def general(rows: Sequence[Row]) -> list[str]:
    """The table of parts that have none of their own: a line for each row."""
    cells = [["", "ms", "host ms", "speedup", "peak GB"]]
    title = ""
    for row in rows:
        if failed(row):
            continue
        case = " ".join(row[name] for name in ("operation", "size", "dtype") if row[name])
        if case != title:
            cells.append([title := case])
        peak = f"{int(row['peak_bytes']) / 1e9:.2f}" if row["peak_bytes"] else "-"
        name = f"  {row['provider']}" + (f" K={row['k']}" if row["k"] not in ("", "0") else "")
        cells.append([name, *(number(row[n]) for n in ("p50_ms", "wall_p50_ms", "speedup")), peak])
    return [*(aligned(cells) if len(cells) > 1 else ["  nothing measured"]), *errors(rows)]


# --- Single operations on the CPU --------------------------------------------------------------------------------

#: The provider that is ours, where there is one: the others are a multiple of its time.
OURS = ("native", "delta", "task bank")


def by_shape(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[int, dict[str, Row]]]:
    """Rows by (kernel, size, dtype), by K, and by provider."""
    found: dict[tuple[str, str, str], dict[int, dict[str, Row]]] = {}
    for row in rows:
        shape = found.setdefault((row["kernel"], row["size"], row["dtype"]), {})
        shape.setdefault(int(row["k"]), {})[row["provider"]] = row
    return found


def over_baselines(rows: Iterable[Row]) -> str:
    """Markdown: our median, and how many times as long every other provider takes."""
    lines = ["| kernel | size | dtype | K | ours | of copy | others, as a multiple of ours |", "|---" * 7 + "|"]
    for (kernel, size, dtype), by_k in sorted(by_shape(rows).items()):
        for k, own in sorted(by_k.items()):
            name = next((name for name in OURS if name in own), None)
            if name is None:  # baselines; they are on the lines of every K
                continue
            ours = own[name]
            others = ", ".join(
                f"{other} {float(row['p50_us']) / float(ours['p50_us']):.3g}x"
                for other, row in {**by_k.get(0, {}), **own}.items()
                if other != name
            )
            milliseconds = f"{float(ours['p50_us']) / 1000:.3g} ms"
            cells = [kernel, size, dtype, k or "", milliseconds, ours["fraction_of_copy"], others]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
