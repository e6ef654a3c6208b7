"""Whether two sets of parameters are the same, and how much two selections have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gradsel.errors import did_you_mean
from gradsel.masks import Mask, shared_entries
from gradsel.tables import shape_text, table

Shapes = Mapping[str, Sequence[int]]


def require_same_parameters(these: Shapes, those: Shapes, this: str, that: str) -> None:
    """Checks that two sets of parameters have the same names and shapes.

    Args:
        these, those: shapes by name.
        this, that: what to call them in the message.

    Raises:
        ValueError: names or shapes differ; the message says which.
    """
    missing = [name for name in these if name not in those]
    unknown = [name for name in those if name not in these]
    faults = []
    if missing:
        faults.append(f"{that} lacks {_some(missing)}{did_you_mean(missing[0], unknown)}")
    if unknown:
        faults.append(f"{this} lacks {_some(unknown)}")
    other = [name for name in these if name in those and tuple(these[name]) != tuple(those[name])]
    if other:
        first = other[0]
        shapes = f"{shape_text(these[first])} in {this}, {shape_text(those[first])} in {that}"
        faults.append(f"shapes differ in {_some(other)}: {first} is {shapes}")
    if faults:
        raise ValueError(f"{this} and {that} are not of the same model: {'; '.join(faults)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"


@dataclass(frozen=True)
class Overlap:
    """What two selections have in common; printable.

    Attributes:
        shared: number of entries that both select.
        a, b: numbers of entries that each selects.
        parameters: the same for every parameter that was compared.
    """

    shared: int
    a: int
    b: int
    parameters: Mapping[str, Overlap] = field(default_factory=dict, repr=False)

    @property
    def share(self) -> float:
        """Shared entries as a fraction of the smaller selection; NaN if that is empty."""
        return self.shared / min(self.a, self.b) if min(self.a, self.b) else math.nan

    @property
    def jaccard(self) -> float:
        """Shared entries as a fraction of the entries that either selects; NaN if there are none."""
        either = self.a + self.b - self.shared
        return self.shared / either if either else math.nan

    def __str__(self) -> str:
        cells = [(name, *part._cells()) for name, part in self.parameters.items() if part.a or part.b]
        return "\n".join(
            table(("parameter", "shared", "a", "b", "share", "jaccard"), [*cells, ("in all", *self._cells())])
        )

    def _cells(self) -> tuple[str, ...]:
        counts = (f"{count:,}" for count in (self.shared, self.a, self.b))
        return (*counts, *("-" if math.isnan(x) else f"{100 * x:.1f} %" for x in (self.share, self.jaccard)))


def overlap(a: Mapping[str, Mask], b: Mapping[str, Mask], whole: bool) -> Overlap:
    """The overlap of masks of the same parameters; ``whole`` includes those that either side trains whole."""
    parts = {
        name: Overlap(shared_entries(mask, b[name]), mask.nnz, b[name].nnz)
        for name, mask in a.items()
        if whole or not (mask.is_whole or b[name].is_whole)
    }
    shared, of_a, of_b = (sum(getattr(part, count) for part in parts.values()) for count in ("shared", "a", "b"))
    return Overlap(shared, of_a, of_b, parts)
