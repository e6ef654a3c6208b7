"""Writing a delta to a plain or attached model in place, and reverting it bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradsel.attached import attached_root
from gradsel.delta.fitting import fitted, in_model
from gradsel.delta.heads import heads_in
from gradsel.delta.parts import Part, entries_of, same_bits, tensors_of, write_
from gradsel.delta.quantised import (
    differences_of,
    put_on,
    require_fits,
    require_on,
    require_quantised_base,
    split,
    take_off,
)
from gradsel.delta.sites import (
    FORCE,
    Site,
    is_base,
    originals_in,
    require_agreement,
    require_base,
    require_plain,
    site_of,
    sites_of,
    tensor_of,
)  # fmt: skip
from gradsel.delta.trained import Trained, trained_in
from gradsel.interrupts import uninterrupted
from gradsel.masks import same
from gradsel.nn.buffers import kept_buffers, restore_buffers


def fit(
    parts: Mapping[str, Part], model: nn.Module, force: bool, own_heads: bool = False
) -> tuple[list[Site], list[Tensor]]:
    """The sites of the parts in a plain model, and the entries that will be replaced there.

    Parts by the names of a checkpoint are translated.

    Args:
        own_heads: tensors that are set whole may have another number of classes; their sites are
            :class:`~gradsel.delta.heads.Head`, and no entries are replaced there.

    Raises:
        ValueError: see :func:`sites_of` and :func:`originals_in`.
    """

    def attempt(parts: Mapping[str, Part], force: bool) -> tuple[list[Site], list[Tensor]]:
        heads = heads_in(parts, model) if own_heads else {}
        sites = sites_of({name: part for name, part in parts.items() if name not in heads}, model, force)
        require_agreement(sites)
        originals = originals_in(sites, force)
        return [*sites, *heads.values()], originals + [head.tensor.new_empty(0) for head in heads.values()]

    require_plain(model)
    return fitted(parts, in_model(model), force, attempt)


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
        parts, added = split(parts, model)
        if not force:
            require_quantised_base(added)
        self._sites, self._originals = fit(parts, model, force)
        self._added = put_on(added)
        try:
            with uninterrupted():
                for site in self._sites:
                    write_(site.tensor, site.part, site.values)
        except BaseException:  # an interrupt comes at the end of the block
            with uninterrupted():
                for site, entries in zip(self._sites, self._originals, strict=True):
                    write_(site.tensor, site.part, entries)
                take_off(self._added)
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
        require_on(self._added)
        if not force:
            changed = [s.name for s in self._sites if not same_bits(entries_of(s.tensor, s.part), s.values)]
            if changed:
                raise RuntimeError(
                    f"{len(changed)} tensors have changed since the delta was applied, first {changed[0]}: reverting "
                    f"would not restore the model; {FORCE}"
                )
        with uninterrupted():
            for site, entries in zip(self._sites, self._originals, strict=True):
                write_(site.tensor, site.part, entries)
            take_off(self._added)
            self._take_off()
            self.active = False

    def __repr__(self) -> str:
        count = sum(site.part.mask.nnz for site in self._sites)
        count += sum(forward.mask.nnz for _, forward in self._added)
        return f"Applied({count:,} entries of {len(self._sites) + len(self._added)} tensors)"


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
    """Sets the values, weights and buffers of an attached model; its originals stay, and must match the delta's base.

    Buffers that the delta does not set are as they were at attach().

    Raises:
        ValueError: other entries are attached or, without force, the base differs. Nothing has been written.
    """
    trained, quantised = trained_in(root), differences_of(root)
    require_fits(quantised, parts, force)
    added = {name: parts[name] for name in quantised}
    parts = {name: part for name, part in parts.items() if name not in added}
    there = in_model(root, {name: own.whole_before for name, own in trained.items()})
    parts, sites = fitted(parts, there, force, lambda parts, force: _fit_attached(parts, root, trained, force))
    with uninterrupted(), torch.no_grad():
        for name, own in trained.items():
            own.values.copy_(parts[name].values)
            own.mask.scatter_(own.tensor, own.values)
        for name, part in added.items():
            values = quantised[name].values()
            assert values is not None
            values.copy_(part.values)
        restore_buffers(root)
        for site in sites:
            write_(site.tensor, site.part, site.values)


def _fit_attached(
    parts: Mapping[str, Part], root: nn.Module, trained: Mapping[str, Trained], force: bool
) -> tuple[Mapping[str, Part], list[Site]]:
    """The parts, and the sites of those that are for buffers, after all checks."""
    if differing := [name for name in trained if name in parts and parts[name].differences]:
        raise ValueError(
            f"the delta holds differences from a quantised {differing[0]}, which is dense in the model: apply it to "
            "the model before attach(), then select and attach"
        )
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
    sites = [site_of(name, parts[name], buffers, force) for name in buffers]
    kept = {name: tensor for name, tensor in kept_buffers(root).items() if name in buffers}
    before = buffers | {name: tensor.to(buffers[name].device, buffers[name].dtype) for name, tensor in kept.items()}
    for name, own in trained.items():
        tensor_of(name, parts[name], {name: own.tensor}, force)
    if not force:
        wrong = [
            name
            for name, own in trained.items()
            if not is_base(name, parts[name], own.digest_before(parts[name]), own.fingerprint_before)
        ]
        require_base(wrong, len(parts))
    originals_in([site_of(name, parts[name], before, force) for name in buffers], force)
    return parts, sites
