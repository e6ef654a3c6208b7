"""Translating the parts of a delta between the names in a model and those in its checkpoints.

A part of a tensor that only has another name stays as it is. Where tensors are merged, split or permuted on the way,
the part's entries move with them. The digest of such a part would cover other entries there, so the base is checked in
the layout that the delta was made in, and recognised by new digests from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor

from gradsel.delta.parts import Part, ascending, read, same_bits
from gradsel.delta.sites import is_base, require_base
from gradsel.masks import same
from gradsel.masks.combining import recognised
from gradsel.parameters.checkpoint_names import CheckpointNames, Group, Shape
from gradsel.parameters.fingerprints import fingerprint
from gradsel.tables import shape_text

Parts = Mapping[str, Part]


def translated(
    parts: Parts,
    names: CheckpointNames,
    into: Literal["model", "checkpoint"],
    base: Callable[[Mapping[str, Part], Group], Mapping[str, Tensor]] | None = None,
    force: bool = False,
) -> dict[str, Part]:
    """The parts by their names in a model or checkpoint; those without other names there as they are.

    Args:
        base: the tensors of the base there, for parts that move and their group. None: do not check the base; these
            parts will not know theirs.
        force: leave such parts without knowledge of their base, rather than refuse them, if it is another.

    Raises:
        ValueError: parts do not fit the tensors that they are translated for, two are for one tensor, or the base of
            those that move is not the one that the delta was made on.
    """
    found: dict[str, Part] = {}
    moving: dict[int, tuple[Group, dict[str, Part]]] = {}
    for name, part in parts.items():
        group = names.group(name, into)
        if group is None:
            _put(found, name, part)
        elif group.is_renaming:
            _put(found, next(iter(tensors_there(group, into))), part)
        else:
            _put(moving.setdefault(id(group), (group, {}))[1], names.own_name(name, into), part)
    for group, own in moving.values():
        sources = _sources(group, into)
        made: Parts = _entries_moved(group, own, into, sources)
        if base is not None:
            made = _recognised(own, made, _here(group, into), sources, base(made, group), force)
        for name, part in made.items():
            _put(found, name, part)
    return found


def _put(parts: dict[str, Part], name: str, part: Part) -> None:
    other = parts.setdefault(name, part)
    if other is not part and not (same(other.mask, part.mask) and same_bits(other.values, part.values)):
        raise ValueError(f"two tensors of the delta stand for {name}, with different entries")


def tensors_there(group: Group, into: str) -> dict[str, Shape]:
    """The shapes of a group's tensors where parts are translated to, by name."""
    return group.model if into == "model" else group.checkpoint


def _here(group: Group, into: str) -> dict[str, Shape]:
    return group.checkpoint if into == "model" else group.model


def _sources(group: Group, into: str) -> Tensor:
    """For each entry of the tensors there, its number among the entries of the tensors here."""
    origins = group.origins()
    return origins if into == "model" else _inverse(origins)


def _inverse(numbers: Tensor) -> Tensor:
    found = torch.empty_like(numbers)
    found[numbers] = torch.arange(numbers.numel(), dtype=numbers.dtype)
    return found


def _entries_moved(group: Group, parts: Parts, into: str, sources: Tensor) -> dict[str, Part]:
    """Parts with the same entries and values in the tensors there, which do not know their base yet."""
    here = _here(group, into)
    for name, part in parts.items():
        if part.mask.shape != here[name]:
            raise ValueError(
                f"{name} is {shape_text(part.mask.shape)} in the delta, but {group}, and there it is "
                f"{shape_text(here[name])}"
            )
    if len(dtypes := {part.dtype for part in parts.values()}) > 1:
        raise ValueError(f"{group}, but in the delta they have several dtypes: {', '.join(map(str, dtypes))}")
    if len(formats := {part.differences for part in parts.values()}) > 1:
        raise ValueError(f"{group}, but in the delta some of them are differences from a quantised base")
    slots, values, originals = _slots(here, parts, sources.dtype)
    found = {}
    sizes = [math.prod(shape) for shape in tensors_there(group, into).values()]
    pieces = slots[sources].split(sizes)
    for (name, shape), piece in zip(tensors_there(group, into).items(), pieces, strict=True):
        entries = (piece >= 0).nonzero().view(-1)
        if not entries.numel():
            continue
        mask = recognised(entries, shape)
        order = torch.empty_like(entries)
        order[ascending(mask)[1]] = piece[entries].long()
        found[name] = Part(
            mask,
            values[order].view(mask.compact_shape),
            next(iter(dtypes)),
            originals=None if originals is None else originals[order].view(mask.compact_shape),
            differences=next(iter(formats)),
        )
    return found


def _slots(here: Mapping[str, Shape], parts: Parts, numbers: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each entry of the tensors here, the number of its value or -1; all values; and all originals, if known."""
    slots = torch.full((sum(math.prod(shape) for shape in here.values()),), -1, dtype=numbers)
    start, count = 0, 0
    values, originals = [], []
    for name, shape in here.items():
        if name in parts:
            part = parts[name]
            entries, order = ascending(part.mask)
            slots[start + entries] = (count + order).to(numbers)
            values.append(part.values.reshape(-1))
            originals.append(part.originals)
            count += part.mask.nnz
        start += math.prod(shape)
    dtype = reduce(torch.promote_types, (each.dtype for each in values))
    known = [each.reshape(-1) for each in originals if each is not None]
    joined = torch.cat(known) if len(known) == len(originals) else None
    return slots, torch.cat([each.to(dtype) for each in values]), joined


def _recognised(
    parts: Parts, made: Parts, here: Mapping[str, Shape], sources: Tensor, base: Mapping[str, Tensor], force: bool
) -> Parts:
    """The moved parts with digests and fingerprints of the base there, if it is the one that the parts were made on."""
    if any(base[name].dtype is not part.dtype for name, part in made.items()):
        return made  # whoever applies them says so
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in base.values()])
    pieces = flat[_inverse(sources).to(flat.device)].split([math.prod(shape) for shape in here.values()])
    tensors = {name: piece.view(here[name]) for name, piece in zip(here, pieces, strict=True) if name in parts}
    if force and not all(part.digest or part.fingerprint for part in parts.values()):
        return made
    wrong = [
        name
        for name, part in parts.items()
        if not is_base(name, part, read(tensors[name], part)[1], partial(fingerprint, tensors[name]))
    ]
    if wrong and force:
        return made
    require_base(wrong, len(parts))
    in_full = all(part.fingerprint == fingerprint(tensors[name]) for name, part in parts.items())
    return {
        name: replace(
            part, digest=read(base[name], part)[1], fingerprint=fingerprint(base[name]) if in_full else "", _places={}
        )
        for name, part in made.items()
    }
