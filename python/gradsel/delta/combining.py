"""Combining two deltas of one base: what they share, where they differ, and their union."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from gradsel.delta.parts import Part, ascending, bits_of
from gradsel.masks import Frozen, Mask, same, union
from gradsel.tables import shape_text, table

_COUNTS = ("a", "b", "shared", "differing")


@dataclass(frozen=True)
class Difference:
    """What two deltas have in common and how far they agree on it; printable.

    Attributes:
        a, b: numbers of entries that each sets.
        shared: number of entries that both set.
        differing: number of shared entries that they set to different bits.
        parameters: the same for every tensor that either touches.
    """

    a: int
    b: int
    shared: int
    differing: int
    parameters: Mapping[str, Difference]

    def __str__(self) -> str:
        lines = [(name, *part._cells()) for name, part in self.parameters.items()]
        return "\n".join(table(("tensor", *_COUNTS), [*lines, ("in all", *self._cells())]))

    def _cells(self) -> tuple[str, ...]:
        return tuple(f"{getattr(self, key):,}" for key in _COUNTS)


def difference(a: Mapping[str, Part], b: Mapping[str, Part]) -> Difference:
    """See ``Delta.difference``."""
    paired({name: part.mask for name, part in a.items()}, {name: part.mask for name, part in b.items()})
    parts = {}
    for name in dict.fromkeys([*a, *b]):
        of_a, of_b = (delta[name].mask.nnz if name in delta else 0 for delta in (a, b))
        shared, differing = _compared(a[name], b[name]) if name in a and name in b else (0, 0)
        parts[name] = Difference(of_a, of_b, shared, differing, {})
    of_a, of_b, shared, differing = (sum(getattr(p, key) for p in parts.values()) for key in _COUNTS)
    return Difference(of_a, of_b, shared, differing, parts)


def paired(a: Mapping[str, Mask], b: Mapping[str, Mask]) -> tuple[dict[str, Mask], dict[str, Mask]]:
    """The masks of both, completed to the tensors that either has.

    Raises:
        ValueError: shapes differ.
    """
    for name in a:
        if name in b and a[name].shape != b[name].shape:
            raise ValueError(
                f"{name} is {shape_text(a[name].shape)} in one delta, {shape_text(b[name].shape)} in the other; they "
                "are of different models"
            )
    shapes = {name: mask.shape for name, mask in [*a.items(), *b.items()]}
    ours, theirs = ({name: own.get(name, Frozen(shape)) for name, shape in shapes.items()} for own in (a, b))
    return ours, theirs


def merged(a: Mapping[str, Part], b: Mapping[str, Part], wins: str) -> dict[str, Part]:
    """See ``Delta.merged``."""
    if wins not in ("neither", "self", "other"):
        raise ValueError(f"wins is {wins!r}, expected 'neither', 'self' or 'other'")
    paired({name: part.mask for name, part in a.items()}, {name: part.mask for name, part in b.items()})
    return {
        name: _merged(name, a[name], b[name], wins) if name in a and name in b else (a if name in a else b)[name]
        for name in dict.fromkeys([*a, *b])
    }


def _merged(name: str, a: Part, b: Part, wins: str) -> Part:
    _require_same_base(name, a, b)
    if wins == "neither" and (count := _compared(a, b)[1]):
        raise ValueError(f"both set {count:,} of the same entries of {name}, to other values; say which wins")
    first, second = (b, a) if wins == "self" else (a, b)  # the second is written last
    dtype = torch.promote_types(a.values.dtype, b.values.dtype)
    if same(a.mask, b.mask):
        known = replace(second, digest=a.digest or b.digest, fingerprint=a.fingerprint or b.fingerprint)
        return replace(known, values=second.values.to(dtype), _places={})
    mask = union(a.mask, b.mask)
    part = first.remade(mask, torch.empty(mask.compact_shape, dtype=dtype))
    entries, order = ascending(mask)
    for source in (first, second):
        own, own_order = ascending(source.mask)
        values = source.values.reshape(-1)[own_order].to(dtype)
        part.values.view(-1)[order[torch.searchsorted(entries, own)]] = values
    return replace(part, fingerprint=a.fingerprint or b.fingerprint)


def _require_same_base(name: str, a: Part, b: Part) -> None:
    if a.dtype is not b.dtype:
        raise ValueError(f"{name} is {a.dtype} in the base of one delta, {b.dtype} in the base of the other")
    known = [(a.fingerprint, b.fingerprint)]
    known += [(a.digest, b.digest)] if same(a.mask, b.mask) else []
    if any(ours and theirs and ours != theirs for ours, theirs in known):
        raise ValueError(f"the deltas were made on bases whose {name} differ")


def _compared(a: Part, b: Part) -> tuple[int, int]:
    """How many entries both set, and how many of these to different bits."""
    (entries, order), (others, other_order) = ascending(a.mask), ascending(b.mask)
    places = torch.searchsorted(others, entries).clamp_(max=others.numel() - 1)
    both = others[places] == entries
    dtype = torch.promote_types(a.values.dtype, b.values.dtype)
    ours = a.values.reshape(-1)[order[both]].to(dtype)
    theirs = b.values.reshape(-1)[other_order[places[both]]].to(dtype)
    return int(both.sum()), int((bits_of(ours) != bits_of(theirs)).sum())
