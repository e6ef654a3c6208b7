"""Deltas: what fine-tuning changed, as a small, safe, exact file. docs/deltas.md describes the format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from gradsel.attached import attached_root
from gradsel.delta import file as delta_file
from gradsel.delta import hub
from gradsel.delta.adapters import AsAdapter
from gradsel.delta.applying import Applied, load_attached
from gradsel.delta.combining import Difference, difference, merged, paired
from gradsel.delta.fitting import by_names_in, fitted, in_model
from gradsel.delta.making import Base, parts_of
from gradsel.delta.parts import Part, same_bits
from gradsel.delta.quantised import require_quantised_base, split
from gradsel.delta.sites import known_fingerprint, require_base, require_finite, require_plain, sites_of
from gradsel.delta.summary import packed_bytes, summary, totals
from gradsel.interrupts import uninterrupted
from gradsel.masks import Frozen, Mask, same
from gradsel.parameters.fingerprints import fingerprint
from gradsel.parameters.names import named_parameters, shaped_parameters
from gradsel.selection.overlap import Overlap, overlap
from gradsel.selection.selection import Selection

PathLike = str | os.PathLike[str]


class Delta(AsAdapter):
    """The entries that a task sets in a base model and their values, by the names of the tensors.

    Attributes:
        notes: how it was made: the notes of the selection and any others that were given.
    """

    def __init__(self, parts: Mapping[str, Part], notes: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            parts: by the names of parameters and buffers.
            notes: anything that can be written as JSON.
        """
        self._parts = dict(parts)
        self.notes = dict(notes or {})

    @staticmethod
    def of(
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        base: Base | None = None,
        selection: Selection | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Delta:
        """The delta of a trained model, which does not change.

        Args:
            model: attached, or trained in any other way; wrapped or not.
            dtype: round floating-point values to this dtype. None: keep the dtype they were trained in, which is
                float32 for an attached model in bfloat16.
            base: the plain model that training began with, or its state_dict, new heads included. If given, changes
                outside the selection are an error, and buffers that changed (running statistics) become part of the
                delta. An attached model does not need it, because it keeps its original entries and buffers.
            selection: what was trained. Required if the model is not attached, unless a base is given: then the delta
                has the entries whose bits differ. For an attached model, it adds its notes, and fingerprints that would
                otherwise be computed.
            notes: further notes, added to those of the selection.

        Raises:
            KeyError, ValueError: the model is not attached and neither selection nor base is given; or they are of
                another model.
        """
        parts = parts_of(model, selection, base, dtype)
        return Delta(parts, {**({} if selection is None else selection.notes), **(notes or {})})

    @staticmethod
    def load(path: PathLike, *, force: bool = False) -> Delta:
        """Reads what :meth:`save` wrote.

        Args:
            path: the file, which may be untrusted.
            force: also load values that are NaN or infinite.

        Raises:
            ValueError: the file is not a delta, is damaged, was written by a later version, or has such values.
        """
        delta = Delta(*delta_file.read(path))
        if not force:
            require_finite(delta, f"{path}: ")
        return delta

    def save(self, path: PathLike, *, originals: bool = False, force: bool = False) -> None:
        """Writes one safetensors file, atomically: a crash leaves the old file intact.

        Args:
            path: the file.
            originals: also save the replaced entries of the base, so that the file alone can revert a checkpoint; up to
                twice the size.
            force: also save values that are NaN or infinite.

        Raises:
            ValueError: the originals are not known, or there are such values.
            TypeError: the notes cannot be written as JSON.
        """
        if not force:
            require_finite(self)
        delta_file.write(path, self, self.notes, originals)

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __eq__(self, other: object) -> bool:
        """Whether both set the same entries to the same bits; their bases and notes do not matter."""
        if not isinstance(other, Delta):
            return NotImplemented
        return self.keys() == other.keys() and all(
            same(part.mask, other[name].mask) and same_bits(part.values, other[name].values)
            for name, part in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def trainable_count(self) -> int:
        """The number of scalars that it sets."""
        return sum(part.mask.nnz for part in self.values())

    #: What :meth:`trainable_count` was called first.
    trained_count = trainable_count

    @property
    def nbytes(self) -> int:
        """Bytes of values and packed indices: the size of the file without its metadata."""
        return sum(map(packed_bytes, self.values()))

    @property
    def masks(self) -> dict[str, Mask]:
        """The entries that it sets, by name."""
        return {name: part.mask for name, part in self.items()}

    def selection(self, model: nn.Module) -> Selection:
        """The selection that trains the same entries.

        To continue training: ``attach(model, delta.selection(model))``, then ``load_delta(model, delta)``.

        Raises:
            ValueError: shapes differ.
        """
        parts = by_names_in(model, self)
        own, _ = split(parts, model)
        sites_of({name: part for name, part in own.items() if name in named_parameters(model)}, model, force=True)
        masks = {
            name: parts[name].mask if name in parts else Frozen(tuple(parameter.shape), "not in the delta")
            for name, parameter in shaped_parameters(model).items()
        }
        known = {name: part.fingerprint for name, part in parts.items() if name in masks and part.fingerprint}
        return Selection(masks, self.notes, known)

    def __str__(self) -> str:
        """A table with one line per group of similar tensors; block numbers are written as ``*``."""
        return summary(self, self.notes)

    def __repr__(self) -> str:
        return f"Delta({totals(self)})"

    # --- Two deltas

    def overlap(self, other: Delta, *, whole: bool = False) -> Overlap:
        """How many entries both set, in total and by tensor.

        Args:
            other: another delta of the same model.
            whole: also count tensors that either sets whole, such as biases.

        Raises:
            ValueError: shapes differ.
        """
        return overlap(*paired(self.masks, other.masks), whole)

    def difference(self, other: Delta) -> Difference:
        """Shared entries, and how many of them have different values, by tensor; printable.

        If one of the deltas was saved in a narrower dtype, values are the same if rounding one gives the other.

        Raises:
            ValueError: shapes differ.
        """
        return difference(self, other)

    def __or__(self, other: Delta) -> Delta:
        if not isinstance(other, Delta):
            return NotImplemented
        return self.merged(other)

    def merged(self, other: Delta, *, wins: Literal["neither", "self", "other"] = "neither") -> Delta:
        """A delta that sets the entries of both; ``a | b`` is ``a.merged(b)``.

        If they set different entries of a tensor, the digest of its base is lost. Applying the result then checks the
        whole tensor, which takes longer.

        Args:
            other: another delta of the same base.
            wins: whose value to take if both set an entry. "neither": their values must be the same, but for rounding
                if one of the deltas was saved in a narrower dtype; then the more exact one is taken.

        Raises:
            ValueError: shapes, dtypes or bases differ; or values of an entry, or sizes of a tensor that both set whole,
                differ and neither wins.
        """
        parts = merged(self, other, wins)
        return Delta(parts, {"policy": f"[{self.notes.get('policy')}] or [{other.notes.get('policy')}]"})

    # --- Models

    def check(self, model: nn.Module) -> None:
        """Checks by fingerprint that all tensors that are set in part are those that the delta was made on.

        :meth:`apply_` checks less: the entries that it replaces, and up to 32 more of each tensor.

        Raises:
            ValueError: shapes, dtypes or values differ, or the delta does not know its base.
        """

        def attempt(parts: Mapping[str, Part], force: bool) -> None:
            sites = sites_of(parts, model, force)
            wrong = [
                site.name
                for site in sites
                if not site.part.mask.is_whole and known_fingerprint(site.name, site.part) != fingerprint(site.tensor)
            ]
            require_base(wrong, len(sites))

        require_plain(model)
        parts, added = split(self, model)
        require_quantised_base(added)
        if dense := [name for name, part in parts.items() if part.differences]:
            raise ValueError(
                f"the delta knows the quantised {dense[0]} that it was trained on, and it is dense in the model, so it "
                "cannot be checked"
            )
        fitted(parts, in_model(model), False, attempt)

    def apply_(self, model: nn.Module, *, force: bool = False) -> Applied:
        """Writes the values to a plain model, in place, and keeps what they replace.

        Values in another dtype than the tensor's are rounded once. Differences from a quantised weight are added by the
        layer's forward if the model has that weight, which stays as it is, and to the entries if it is dense there (the
        16-bit original, which cannot be checked). Parameters stay the same objects at the same
        addresses, and code compiled by torch.compile stays valid.

        Args:
            model: the base, wrapped or not; do not use it during the call.
            force: also apply to another base, to one in another dtype, or if the delta does not know its base.

        Returns:
            A handle whose ``revert_()`` undoes the change.

        Raises:
            ValueError: the model is attached, or is another model or base; nothing has changed.
        """
        return Applied(self, model, force)

    @contextmanager
    def applied(self, model: nn.Module, *, force: bool = False) -> Iterator[Applied]:
        """Applies the delta inside ``with delta.applied(model):``, see :meth:`apply_`; the end restores every byte."""
        handle = None
        try:
            try:
                with uninterrupted():
                    handle = self.apply_(model, force=force)
                yield handle
            finally:
                if handle is not None:
                    handle.revert_()
        except KeyboardInterrupt:  # while the delta was being taken off
            if handle is not None and handle.active:
                handle.revert_()
            raise

    # --- Model hubs

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base: str | nn.Module | None = None,
        originals: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add a delta",
    ) -> str:
        """Pushes the delta to a model hub, in one commit: its file, and a model card.

        Args:
            repo_id: ``"user/birds"``; the repository is made if there is none.
            base: for the card: the name of the base model on the hub; or the model, of which the card then also says
                what share is trained.
            originals: also push the replaced entries of the base; see :meth:`save`.
            private: of a new repository; None: the default of its owner.
            token: of the hub; None: the one that ``hf auth login`` has stored.
            revision: branch to commit to; None: the main one.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: the originals are not known, values are NaN or infinite, or the hub refuses.
        """
        return hub.push(self, repo_id, base, originals, private, token, revision, commit_message)

    @staticmethod
    def from_pretrained(
        source: PathLike, *, revision: str | None = None, token: str | bool | None = None, force: bool = False
    ) -> Delta:
        """Reads a delta from a file, a folder or a model hub.

        Args:
            source: a file; a folder with ``gradsel.delta``, or a result of ``gradsel finetune``; or the id of a
                repository with such files, such as ``"user/birds"``.
            revision: branch, tag or commit on the hub.
            token: of the hub; None: the one that ``hf auth login`` has stored.
            force: see :meth:`load`.

        Raises:
            ValueError: there is none, or as from :meth:`load`.
        """
        return Delta.load(hub.find(source, revision, token), force=force)


def save_delta(
    model: nn.Module,
    path: PathLike,
    *,
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    selection: Selection | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Delta:
    """Saves ``Delta.of(model, ...)``. See :meth:`Delta.of`, and :meth:`Delta.save`, which has more options."""
    delta = Delta.of(model, dtype=dtype, base=base, selection=selection, notes=notes)
    delta.save(path)
    return delta


def load_delta(model: nn.Module, delta: Delta | PathLike, *, force: bool = False) -> Applied | None:
    """Loads a delta into a model.

    Args:
        model: the plain base, see :meth:`Delta.apply_`; or a model that is attached to the same entries (see
            :meth:`Delta.selection`): then its values and weights are set, its originals stay, and training can
            continue.
        delta: a delta, or the path of its file.
        force: see :meth:`Delta.apply_`; an attached model keeps its own originals.

    Returns:
        For a plain model, a handle whose ``revert_()`` undoes the change.

    Raises:
        ValueError: the model is another model or base, or is attached to other entries; nothing has changed.
    """
    delta = delta if isinstance(delta, Delta) else Delta.load(delta, force=force)
    root = attached_root(model)
    if root is None:
        return delta.apply_(model, force=force)
    load_attached(delta, root, force)
    return None
