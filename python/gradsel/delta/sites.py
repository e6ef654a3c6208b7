"""Where the parts of a delta go in a model or checkpoint, and whether the tensors there are those of its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gradsel.attached import attached_root
from gradsel.delta.parts import Part, bits_of, entries_of, read, tensors_of
from gradsel.parameters.fingerprints import fingerprint
from gradsel.parameters.trainable import why_untrainable
from gradsel.tables import shape_text

#: What to do about an error that is no mistake.
FORCE = "pass force=True if that is intended"


@dataclass
class Site:
    """One tensor of a model, and the part of a delta that is written to it.

    Attributes:
        values: the part's values, flat, on the tensor's device and rounded to its dtype.
    """

    name: str
    part: Part
    tensor: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        self._memory = (self.tensor.data_ptr(), self.tensor.dtype, self.tensor.stride())

    def has_moved(self) -> bool:
        """Whether the tensor is in other memory now, for example after ``model.to()``."""
        return self._memory != (self.tensor.data_ptr(), self.tensor.dtype, self.tensor.stride())


def sites_of(parts: Mapping[str, Part], model: nn.Module | Mapping[str, Tensor], force: bool) -> list[Site]:
    """The sites of the parts in a plain model, or in tensors by name.

    Raises:
        ValueError: the model is attached, lacks a tensor, or has one of another shape. Without force also: a tensor has
            another dtype, or one that cannot hold the values.
    """
    if isinstance(model, nn.Module):
        require_plain(model)
    tensors = tensors_of(model)
    return [site_of(name, part, tensors, force) for name, part in parts.items()]


def require_plain(model: nn.Module) -> None:
    """Checks that a model is not attached.

    Raises:
        ValueError: it is.
    """
    if attached_root(model) is not None:
        raise ValueError("the model is attached: use load_delta(model, ...), or call gradsel.detach(model) first")


def site_of(name: str, part: Part, tensors: Mapping[str, Tensor], force: bool) -> Site:
    """The site of a part among tensors by name; see :func:`sites_of`."""
    tensor = tensor_of(name, part, tensors, force)
    values = part.values.reshape(-1).to(tensor.device)
    if part.differences:  # a quantised base in the delta, a dense one here
        values = entries_of(tensor, part) + values
    values = values.to(tensor.dtype)
    if part.values.dtype is not tensor.dtype and not force:
        require_finite({name: part}, f"in {tensor.dtype}, ", tensor.dtype)
    try:
        if not part.mask.is_whole:
            part.places(tensor)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Site(name, part, tensor, values)


def tensor_of(name: str, part: Part, tensors: Mapping[str, Tensor], force: bool) -> Tensor:
    """The tensor that a part is for, after the checks of :func:`sites_of`."""
    if name not in tensors:
        inside = [each.removesuffix(f".{name}") for each in tensors if each.endswith(f".{name}")]
        where = f"; its part {inside[0]!r} has one: pass that part" if len(inside) == 1 else ""
        raise ValueError(f"the model has no {name!r}, which the delta sets; it was made for another model{where}")
    tensor = tensors[name]
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, where it has no entries; load the base's weights first")
    if part.values.is_floating_point() and (found := why_untrainable(tensor)) is not None:
        raise ValueError(f"{name} is {found} in the model, so no entries of it can be replaced")
    if tuple(tensor.shape) != part.mask.shape:
        raise ValueError(
            f"{name} is {shape_text(part.mask.shape)} in the delta, {shape_text(tensor.shape)} in the model; entries "
            "are written in place, so the shapes (for a head: the number of classes) must be the same; "
            "gradsel.TaskBank has heads of all sizes"
        )
    if tensor.is_floating_point() != part.values.is_floating_point():
        raise ValueError(f"{name} is {part.values.dtype} in the delta, {tensor.dtype} in the model")
    if tensor.dtype is not part.dtype and not part.differences and not force:
        raise ValueError(
            f"{name} is {tensor.dtype}, the delta was made on {part.dtype}: the base cannot be recognised, and values "
            f"would be rounded; {FORCE}"
        )
    return tensor


def require_finite(parts: Mapping[str, Part], where: str = "", dtype: torch.dtype | None = None) -> None:
    """Checks that no values are NaN or infinite.

    Args:
        where: the start of the message.
        dtype: round the values to this dtype first.

    Raises:
        ValueError: some are; the message says how many, and where.
    """
    for name, part in parts.items():
        finite = part.values.to(dtype or part.values.dtype).isfinite()
        if not bool(finite.all()):
            raise ValueError(f"{where}{name} has {int((~finite).sum())} values that are NaN or infinite; {FORCE}")


def originals_in(sites: Sequence[Site], force: bool) -> list[Tensor]:
    """The entries that will be replaced, flat in mask order.

    Raises:
        ValueError: without force: these entries or a probe differ from the delta's base, or the base is not known.
    """
    found = [
        (entries_of(site.tensor, site.part), "") if site.part.mask.is_whole else read(site.tensor, site.part)
        for site in sites
    ]
    if not force:
        wrong = [
            site.name
            for site, (_, digest) in zip(sites, found, strict=True)
            if not is_base(site.name, site.part, digest, partial(fingerprint, site.tensor))
        ]
        require_base(wrong, len(sites))
    return [entries for entries, _ in found]


def require_agreement(sites: Sequence[Site]) -> None:
    """Checks that no entry is set to different values under two names of tied tensors.

    Raises:
        ValueError: one is.
    """
    by_memory: dict[int, list[Site]] = {}
    for site in sites:
        if site.tensor.numel():
            by_memory.setdefault(site.tensor.untyped_storage().data_ptr(), []).append(site)
    for tied in by_memory.values():
        if len(tied) == 1 or len({site.tensor.dtype for site in tied}) > 1:
            continue
        starts = [int(site.tensor.storage_offset()) for site in tied]
        own = [start + site.part.places(site.tensor)[0] for start, site in zip(starts, tied, strict=True)]
        places, order = torch.cat(own).sort()
        values = bits_of(torch.cat([site.values for site in tied]))[order]
        clash = (places[1:] == places[:-1]) & (values[1:] != values[:-1])
        if count := int(clash.sum()):
            raise ValueError(
                f"{tied[0].name} and {', '.join(site.name for site in tied[1:])} are one tensor in the model, and the "
                f"delta sets {count:,} of its entries to different values under these names; leave one of them out"
            )


def require_base(wrong: Sequence[str], count: int) -> None:
    """Checks that no tensors differ from those of the base.

    Raises:
        ValueError: ``wrong`` is not empty.
    """
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {count} tensors are not those that the delta was made on, first {wrong[0]}: this is "
            f"another base, or one that was modified already, by training or by another delta; {FORCE}"
        )


def is_base(name: str, part: Part, digest: str, fingerprint: Callable[[], str]) -> bool:
    """Whether the tensor with this digest and fingerprint is the one that the part was made on.

    A tensor that is set whole may be any: nothing of it is left, and a new head is another one every time. So may a
    dense one to which differences are added, because the part knows only the quantised one.
    """
    if part.mask.is_whole or part.differences:
        return True
    return part.digest == digest if part.digest else known_fingerprint(name, part) == fingerprint()


def known_fingerprint(name: str, part: Part) -> str:
    """The fingerprint of a part's base.

    Raises:
        ValueError: it is not known.
    """
    if not part.fingerprint:
        raise ValueError(f"the delta does not know the base of {name}, as it was made without it; {FORCE}")
    return part.fingerprint
