"""Writing a delta to a model in place, and taking it back to the bit."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsel.delta.making import Trained, attached_root, fingerprint_before, trained_in
from gradsel.delta.parts import Part, digest_with, entries_of, read, same_bits, tensors_of, write_
from gradsel.masks import same
from gradsel.parameters.fingerprints import fingerprint
from gradsel.tables import shape_text

_FORCE = "pass force=True if that is meant"


@dataclass
class Site:
    """One tensor of a model, and the part of a delta that goes there.

    Attributes:
        values: those of the part, flat, on the tensor's device and rounded to its dtype.
    """

    name: str
    part: Part
    tensor: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        self._memory = (self.tensor.data_ptr(), self.tensor.dtype, self.tensor.stride())

    def has_moved(self) -> bool:
        """Whether the tensor has got other memory, such as by ``model.to()``."""
        return self._memory != (self.tensor.data_ptr(), self.tensor.dtype, self.tensor.stride())


def sites_of(parts: Mapping[str, Part], model: nn.Module | Mapping[str, Tensor], force: bool) -> list[Site]:
    """Where the parts go in a plain model, or in tensors by name.

    Raises:
        ValueError: the model is attached, lacks a tensor, or has one of another shape or, without force, dtype; values
            that its dtype cannot hold.
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
            "are written in place, so the shapes (of a head: the number of classes) must be the same"
        )
    if tensor.is_floating_point() != part.values.is_floating_point():
        raise ValueError(f"{name} is {part.values.dtype} in the delta, {tensor.dtype} in the model")
    if tensor.dtype is not part.dtype and not force:
        raise ValueError(
            f"{name} is {tensor.dtype}, the delta was made on {part.dtype}: the base cannot be recognised, and values "
            f"are rounded; {_FORCE}"
        )
    return tensor


def require_finite(parts: Mapping[str, Part], where: str = "", dtype: torch.dtype | None = None) -> None:
    """Refuses values that are NaN or infinite.

    Args:
        where: in front of the message.
        dtype: what they are rounded to before.

    Raises:
        ValueError: there are some; it says how many, and where.
    """
    for name, part in parts.items():
        finite = part.values.to(dtype or part.values.dtype).isfinite()
        if not bool(finite.all()):
            raise ValueError(f"{where}{name} has {int((~finite).sum())} values that are NaN or infinite; {_FORCE}")


def originals_in(sites: Sequence[Site], force: bool) -> list[Tensor]:
    """The entries that are about to be replaced, flat in mask order.

    Raises:
        ValueError: without force: they, or a probe, are not those that the delta was made on, or that is not known.
    """
    found = [read(site.tensor, site.part) for site in sites]
    if not force:
        wrong = [site.name for site, (_, digest) in zip(sites, found, strict=True) if not _is_base(site, digest)]
        require_base(wrong, len(sites))
    return [entries for entries, _ in found]


def require_base(wrong: Sequence[str], count: int) -> None:
    """Refuses tensors that are not those of the base.

    Raises:
        ValueError: there are some.
    """
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {count} tensors are not those that the delta was made on, first {wrong[0]}: this is "
            f"another base, or one that is modified already, by training or by another delta; {_FORCE}"
        )


def _is_base(site: Site, digest: str) -> bool:
    if site.part.digest:
        return site.part.digest == digest
    return known_fingerprint(site.name, site.part) == fingerprint(site.tensor)


def known_fingerprint(name: str, part: Part) -> str:
    """What a part knows of its base where it has no digest.

    Raises:
        ValueError: nothing.
    """
    if not part.fingerprint:
        raise ValueError(f"the delta does not know the base of {name}, as it was made without; {_FORCE}")
    return part.fingerprint


# --- Layers ------------------------------------------------------------------------------------------------------


class Layer:
    """Something that has replaced entries of tensors, on top of what others had replaced before."""

    def __init__(self) -> None:
        self._tensors: frozenset[int] = frozenset()

    def _put_on(self, sites: Sequence[Site]) -> None:
        self._tensors = _memory_of(sites)
        _layers[:] = [layer for layer in _layers if layer() not in (None, self)]
        _layers.append(weakref.ref(self))

    def _require_top(self) -> None:
        """Refuses where tensors have been written on top."""
        for reference in reversed(_layers):
            layer = reference()
            if layer is self:
                return
            if layer is not None and layer._tensors & self._tensors:
                raise RuntimeError(f"{layer} has been applied on top of {self}, to the same tensors; revert that first")

    def _require_alone(self, sites: Sequence[Site]) -> None:
        """Refuses where anything else has replaced entries of these tensors."""
        for reference in _layers:
            layer = reference()
            if layer is not None and layer is not self and layer._tensors & _memory_of(sites):
                raise RuntimeError(f"{layer} has been applied to the same tensors; revert that first")

    def _take_off(self) -> None:
        _layers[:] = [layer for layer in _layers if layer() not in (None, self)]
        self._tensors = frozenset()


def _memory_of(sites: Sequence[Site]) -> frozenset[int]:
    """Which memory the tensors lie in: that of tied ones, and of views, is the same."""
    return frozenset(site.tensor.untyped_storage().data_ptr() for site in sites if site.tensor.numel())


# Oldest first. Whoever forgets a layer can no longer revert it, so that it is in nobody's way.
_layers: list[weakref.ref[Layer]] = []


class Applied(Layer):
    """A delta in a model, from ``Delta.apply_``: keeps the entries that it has replaced.

    Attributes:
        active: it has not been reverted.
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
        """Bytes of the entries that are kept."""
        return sum(entries.nbytes for entries in self._originals)

    def revert_(self, force: bool = False) -> None:
        """Writes the replaced entries back: every byte of the model is as it was.

        Args:
            force: also where something else has changed these entries since; what that did to others stays.

        Raises:
            RuntimeError: it was reverted already; another delta was applied on top, to the same tensors; the model was
                moved or cast; or, without force, these entries were changed. Nothing has been written.
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
                    f"would not bring the model back as it was; {_FORCE}"
                )
        for site, entries in zip(self._sites, self._originals, strict=True):
            write_(site.tensor, site.part, entries)
        self._take_off()
        self.active = False

    def __repr__(self) -> str:
        count = sum(site.part.mask.nnz for site in self._sites)
        return f"Applied({count:,} entries of {len(self._sites)} tensors)"


def require_in_place(sites: Sequence[Site], model: nn.Module) -> None:
    """Refuses tensors that have other memory than when they were found, or that the model no longer has.

    Raises:
        RuntimeError: there are some, or the model has been attached.
    """
    if attached_root(model) is not None:
        raise RuntimeError("the model was attached since the delta was applied; call gradsel.detach(model) first")
    now = tensors_of(model)
    moved = [site.name for site in sites if site.has_moved() or now.get(site.name) is not site.tensor]
    if moved:
        raise RuntimeError(f"{moved[0]} was moved, cast or replaced since the delta was applied; undo that first")


# --- Attached models ---------------------------------------------------------------------------------------------


def load_attached(parts: Mapping[str, Part], root: nn.Module, force: bool) -> None:
    """Sets the values of an attached model, and its weights; the originals stay, and must be those of the delta's base.

    Raises:
        ValueError: other entries are attached; without force: another base. Nothing has been written.
    """
    trained = trained_in(root)
    buffers = {name: buffer for name, buffer in tensors_of(root).items() if name in parts and name not in trained}
    unknown = [name for name in trained if name not in parts]
    unknown += [name for name in parts if name not in trained and not _is_buffer(name, root)]
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
        require_base([name for name, own in trained.items() if not _began_with(own, name, parts[name])], len(parts))
    originals_in(sites, force)
    with torch.no_grad():
        for name, own in trained.items():
            own.values.copy_(parts[name].values)
            own.mask.scatter_(own.tensor, own.values)
    for site in sites:
        write_(site.tensor, site.part, site.values)


def _began_with(own: Trained, name: str, part: Part) -> bool:
    """Whether a parameter was, at attach(), the one that the delta was made on."""
    if part.digest:
        return part.digest == digest_with(own.originals, own.tensor, part)
    return known_fingerprint(name, part) == fingerprint_before(own)


def _is_buffer(name: str, root: nn.Module) -> bool:
    return name in dict(root.named_buffers())
