"""Combining two deltas of one base: what they share, where they differ, and their union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        differing: number of shared entries that they set to different bits or, if their values were saved in different
            dtypes, to values of which neither is the other one rounded.
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
    resized = _resized(a, b)
    _require_paired(a, b, resized)
    parts = {}
    for name in dict.fromkeys([*a, *b]):
        of_a, of_b = (delta[name].mask.nnz if name in delta else 0 for delta in (a, b))
        is_shared = name in a and name in b and name not in resized
        shared, differing = _compared(a[name], b[name]) if is_shared else (0, 0)
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
    resized = _resized(a, b)
    if resized and wins == "neither":
        shapes = [shape_text(part.mask.shape) for part in (a[resized[0]], b[resized[0]])]
        raise ValueError(f"both set {resized[0]} whole, to sizes {' and '.join(shapes)}; say which wins")
    _require_paired(a, b, resized)
    parts = {}
    for name in dict.fromkeys([*a, *b]):
        if name in resized:
            parts[name] = (a if wins == "self" else b)[name]
        elif name in a and name in b:
            parts[name] = _merged(name, a[name], b[name], wins)
        else:
            parts[name] = (a if name in a else b)[name]
    return parts


def _resized(a: Mapping[str, Part], b: Mapping[str, Part]) -> list[str]:
    """The tensors that both set whole, to other sizes: the heads of two tasks with different numbers of classes."""
    wholes = [name for name, part in a.items() if name in b and part.mask.is_whole and b[name].mask.is_whole]
    return [name for name in wholes if a[name].mask.shape != b[name].mask.shape]


def _require_paired(a: Mapping[str, Part], b: Mapping[str, Part], resized: Sequence[str]) -> None:
    paired(*({name: part.mask for name, part in own.items() if name not in resized} for own in (a, b)))


def _merged(name: str, a: Part, b: Part, wins: str) -> Part:
    _require_same_base(name, a, b)
    if wins == "neither" and (count := _compared(a, b)[1]):
        raise ValueError(f"both set {count:,} of the same entries of {name}, to other values; say which wins")
    dtype = torch.promote_types(a.values.dtype, b.values.dtype)
    first_wins = wins == "self" or (wins == "neither" and a.values.dtype is dtype)  # the more exact one
    first, second = (b, a) if first_wins else (a, b)  # the second is written last
    if same(a.mask, b.mask):
        known = replace(second, digest=a.digest or b.digest, fingerprint=a.fingerprint or b.fingerprint)
        return replace(known, values=second.values.to(dtype), _places={})
    mask = union(a.mask, b.mask)
    part = first.remade(mask, torch.empty(mask.compact_shape, dtype=dtype))
    is_known = a.originals is not None and b.originals is not None
    originals = torch.empty(mask.compact_shape, dtype=a.dtype) if is_known else None
    entries, order = ascending(mask)
    for source in (first, second):
        own, own_order = ascending(source.mask)
        places = order[torch.searchsorted(entries, own)]
        part.values.view(-1)[places] = source.values.reshape(-1)[own_order].to(dtype)
        if originals is not None and source.originals is not None:
            originals.view(-1)[places] = source.originals.reshape(-1)[own_order]
    return replace(part, fingerprint=a.fingerprint or b.fingerprint, originals=originals)


def _require_same_base(name: str, a: Part, b: Part) -> None:
    if bool(a.differences) != bool(b.differences):
        raise ValueError(f"{name} has differences from a quantised base in one delta, and values in the other")
    if a.dtype is not b.dtype:
        raise ValueError(f"{name} is {a.dtype} in the base of one delta, {b.dtype} in the base of the other")
    known = [(a.fingerprint, b.fingerprint)]
    known += [(a.digest, b.digest)] if same(a.mask, b.mask) else []
    if any(ours and theirs and ours != theirs for ours, theirs in known):
        raise ValueError(f"the deltas were made on bases whose {name} differ")


def _compared(a: Part, b: Part) -> tuple[int, int]:
    """How many entries both set, and how many of these to different values; see :class:`Difference`."""
    (entries, order), (others, other_order) = ascending(a.mask), ascending(b.mask)
    places = torch.searchsorted(others, entries).clamp_(max=others.numel() - 1)
    both = others[places] == entries
    ours = a.values.reshape(-1)[order[both]]
    theirs = b.values.reshape(-1)[other_order[places[both]]]
    return int(both.sum()), int((_differ(ours, theirs) & _differ(theirs, ours)).sum())


def _differ(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Where the second does not have the bits of the first one rounded to its dtype."""
    return bits_of(values.to(rounded.dtype)) != bits_of(rounded)
