"""Writing a delta to a plain or attached model in place, and reverting it bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gradsel.delta.parts import Part, entries_of, read, same_bits, tensors_of, write_
from gradsel.delta.trained import attached_root, trained_in
from gradsel.masks import same
from gradsel.parameters.fingerprints import fingerprint
from gradsel.tables import shape_text

_FORCE = "pass force=True if that is intended"


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
    if isinstance(model, nn.Module) and attached_root(model) is not None:
        raise ValueError("the model is attached: use load_delta(model, ...), or call gradsel.detach(model) first")
    tensors = tensors_of(model)
    return [_site(name, part, tensors, force) for name, part in parts.items()]


def _site(name: str, part: Part, tensors: Mapping[str, Tensor], force: bool) -> Site:
    tensor = _tensor(name, part, tensors, force)
    values = part.values.reshape(-1).to(tensor.device, tensor.dtype)
    if part.values.dtype is not tensor.dtype and not force:
        require_finite({name: part}, f"in {tensor.dtype}, ", tensor.dtype)
    try:
        if not part.mask.is_whole:
            part.places(tensor)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Site(name, part, tensor, values)


def _tensor(name: str, part: Part, tensors: Mapping[str, Tensor], force: bool) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the model has no {name!r}, which the delta sets; it was made for another model")
    tensor = tensors[name]
    if tuple(tensor.shape) != part.mask.shape:
        raise ValueError(
            f"{name} is {shape_text(part.mask.shape)} in the delta, {shape_text(tensor.shape)} in the model; entries "
            "are written in place, so the shapes (for a head: the number of classes) must be the same"
        )
    if tensor.is_floating_point() != part.values.is_floating_point():
        raise ValueError(f"{name} is {part.values.dtype} in the delta, {tensor.dtype} in the model")
    if tensor.dtype is not part.dtype and not force:
        raise ValueError(
            f"{name} is {tensor.dtype}, the delta was made on {part.dtype}: the base cannot be recognised, and values "
            f"would be rounded; {_FORCE}"
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
            raise ValueError(f"{where}{name} has {int((~finite).sum())} values that are NaN or infinite; {_FORCE}")


def originals_in(sites: Sequence[Site], force: bool) -> list[Tensor]:
    """The entries that will be replaced, flat in mask order.

    Raises:
        ValueError: without force: these entries or a probe differ from the delta's base, or the base is not known.
    """
    found = [read(site.tensor, site.part) for site in sites]
    if not force:
        wrong = [
            site.name
            for site, (_, digest) in zip(sites, found, strict=True)
            if not _is_base(site.name, site.part, digest, partial(fingerprint, site.tensor))
        ]
        require_base(wrong, len(sites))
    return [entries for entries, _ in found]


def require_base(wrong: Sequence[str], count: int) -> None:
    """Checks that no tensors differ from those of the base.

    Raises:
        ValueError: ``wrong`` is not empty.
    """
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {count} tensors are not those that the delta was made on, first {wrong[0]}: this is "
            f"another base, or one that was modified already, by training or by another delta; {_FORCE}"
        )


def _is_base(name: str, part: Part, digest: str, fingerprint: Callable[[], str]) -> bool:
    """Whether the tensor with this digest and fingerprint is the one that the part was made on."""
    return part.digest == digest if part.digest else known_fingerprint(name, part) == fingerprint()


def known_fingerprint(name: str, part: Part) -> str:
    """The fingerprint of a part's base.

    Raises:
        ValueError: it is not known.
    """
    if not part.fingerprint:
        raise ValueError(f"the delta does not know the base of {name}, as it was made without it; {_FORCE}")
    return part.fingerprint


# --- Overlays ----------------------------------------------------------------------------------------------------


class Overlay:
    """Replaces entries of tensors, perhaps on top of other overlays: a delta in a model, or a bank of tasks."""

    def __init__(self) -> None:
        self._tensors: frozenset[int] = frozenset()

    def _put_on(self, sites: Sequence[Site]) -> None:
        self._tensors = _memory_of(sites)
        _overlays[:] = [overlay for overlay in _overlays if overlay() not in (None, self)]
        _overlays.append(weakref.ref(self))

    def _require_top(self) -> None:
        """Checks that no other overlay was put on top, on the same tensors."""
        for reference in reversed(_overlays):
            overlay = reference()
            if overlay is self:
                return
            if overlay is not None and overlay._tensors & self._tensors:
                raise RuntimeError(
                    f"{overlay} has been applied on top of {self}, to the same tensors; revert that first"
                )

    def _require_alone(self, sites: Sequence[Site]) -> None:
        """Checks that no other overlay is on these tensors."""
        for reference in _overlays:
            overlay = reference()
            if overlay is not None and overlay is not self and overlay._tensors & _memory_of(sites):
                raise RuntimeError(f"{overlay} has been applied to the same tensors; revert that first")

    def _take_off(self) -> None:
        _overlays[:] = [overlay for overlay in _overlays if overlay() not in (None, self)]
        self._tensors = frozenset()


def _memory_of(sites: Sequence[Site]) -> frozenset[int]:
    """The memory that the tensors lie in, which tied tensors and views share."""
    return frozenset(site.tensor.untyped_storage().data_ptr() for site in sites if site.tensor.numel())


# Oldest first. An overlay that nobody holds any more can no longer be reverted, so it must not block others.
_overlays: list[weakref.ref[Overlay]] = []


class Applied(Overlay):
    """A delta in a model, from ``Delta.apply_``; keeps the entries that it replaced.

    Attributes:
        active: whether it has not been reverted yet.
    """

    def __init__(self, parts: Mapping[str, Part], model: nn.Module, force: bool) -> None:
        super().__init__()
        self._model = model
        self._sites = sites_of(parts, model, force)
        self._originals = originals_in(self._sites, force)
        written = 0
        try:
            for site in self._sites:
                write_(site.tensor, site.part, site.values)
                written += 1
        except BaseException:
            for site, entries in zip(self._sites[:written], self._originals, strict=False):
                write_(site.tensor, site.part, entries)
            raise
        self._put_on(self._sites)
        self.active = True

    @property
    def nbytes(self) -> int:
        """Bytes of the replaced entries that are kept."""
        return sum(entries.nbytes for entries in self._originals)

    def revert_(self, force: bool = False) -> None:
        """Writes the replaced entries back, so that the model is the same as before, byte for byte.

        Args:
            force: also revert if something else has changed these entries since; its other changes stay.

        Raises:
            RuntimeError: the delta was reverted already; another delta was applied on top, to the same tensors; the
                model was moved or cast; or, without force, these entries were changed. Nothing has been written.
        """
        if not self.active:
            raise RuntimeError("this delta was reverted already")
        self._require_top()
        require_in_place(self._sites, self._model)
        if not force:
            changed = [s.name for s in self._sites if not same_bits(entries_of(s.tensor, s.part), s.values)]
            if changed:
                raise RuntimeError(
                    f"{len(changed)} tensors have changed since the delta was applied, first {changed[0]}: reverting "
                    f"would not restore the model; {_FORCE}"
                )
        for site, entries in zip(self._sites, self._originals, strict=True):
            write_(site.tensor, site.part, entries)
        self._take_off()
        self.active = False

    def __repr__(self) -> str:
        count = sum(site.part.mask.nnz for site in self._sites)
        return f"Applied({count:,} entries of {len(self._sites)} tensors)"


def require_in_place(sites: Sequence[Site], model: nn.Module) -> None:
    """Checks that the tensors are still in the model and in the same memory.

    Raises:
        RuntimeError: some are not, or the model has been attached.
    """
    if attached_root(model) is not None:
        raise RuntimeError("the model was attached since the delta was applied; call gradsel.detach(model) first")
    now = tensors_of(model)
    moved = [site.name for site in sites if site.has_moved() or now.get(site.name) is not site.tensor]
    if moved:
        raise RuntimeError(f"{moved[0]} was moved, cast or replaced since the delta was applied; undo that first")


# --- Attached models ---------------------------------------------------------------------------------------------


def load_attached(parts: Mapping[str, Part], root: nn.Module, force: bool) -> None:
    """Sets the values and weights of an attached model; its originals stay, and must match the delta's base.

    Raises:
        ValueError: other entries are attached or, without force, the base differs. Nothing has been written.
    """
    trained = trained_in(root)
    buffers = {name: buffer for name, buffer in tensors_of(root).items() if name in parts and name not in trained}
    unknown = [name for name in trained if name not in parts]
    buffer_names = dict(root.named_buffers())
    unknown += [name for name in parts if name not in trained and name not in buffer_names]
    unknown += [name for name, own in trained.items() if name in parts and not same(own.mask, parts[name].mask)]
    if unknown:
        raise ValueError(
            f"the model is attached to a selection of other entries than the delta's, first of {unknown[0]}: "
            "gradsel.detach(model, restore=True), then attach it to delta.selection(model)"
        )
    sites = [_site(name, parts[name], buffers, force) for name in buffers]
    for name, own in trained.items():
        _tensor(name, parts[name], {name: own.tensor}, force)
    if not force:
        wrong = [
            name
            for name, own in trained.items()
            if not _is_base(name, parts[name], own.digest_before(parts[name]), own.fingerprint_before)
        ]
        require_base(wrong, len(parts))
    originals_in(sites, force)
    with torch.no_grad():
        for name, own in trained.items():
            own.values.copy_(parts[name].values)
            own.mask.scatter_(own.tensor, own.values)
    for site in sites:
        write_(site.tensor, site.part, site.values)
