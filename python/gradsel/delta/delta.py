"""Deltas: what fine-tuning changed, as a small, safe, exact file. The format is in docs/deltas.md."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gradsel.delta import file as delta_file
from gradsel.delta.applying import Applied, known_fingerprint, load_attached, require_base, require_finite, sites_of
from gradsel.delta.coding import packed
from gradsel.delta.combining import Difference, difference, merged, paired
from gradsel.delta.making import Base, attached_root, parts_of
from gradsel.delta.parts import Part, same_bits
from gradsel.delta.shira import read_shira, write_shira
from gradsel.masks import Frozen, Mask, same
from gradsel.parameters.fingerprints import fingerprint
from gradsel.parameters.names import named_parameters
from gradsel.selection.overlap import Overlap, overlap
from gradsel.selection.selection import Selection
from gradsel.tables import grouped, shape_text, table

PathLike = str | os.PathLike[str]


class Delta(Mapping[str, Part]):
    """The entries that a task sets in a base model, and what it sets them to, by the names of the tensors.

    Attributes:
        notes: how it came about: those of the selection, and what else was given.
    """

    def __init__(self, parts: Mapping[str, Part], notes: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            parts: by the names of parameters and buffers.
            notes: anything that JSON can hold.
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
        """The delta of a trained model. The model stays as it is.

        Args:
            model: attached, or trained in any other way; wrapped or not.
            dtype: round floating-point values to this one. None: as they were trained, which for an attached model in
                bfloat16 is float32.
            base: the plain model that training began with, or its state_dict, new heads included. With it, buffers
                that have changed (running statistics) are part of the delta, and changes outside the selection are an
                error. An attached model knows its original entries without it.
            selection: what was trained. Needed where the model is not attached; without it, and with a base, the delta
                has the entries whose bits differ. Of an attached model it gives notes, and fingerprints of the weights
                that it was made on, which else are computed.
            notes: beside those of the selection.

        Raises:
            KeyError, ValueError: neither attached, nor selection or base; a selection or base of another model.
        """
        parts = parts_of(model, selection, base, dtype)
        return Delta(parts, {**({} if selection is None else selection.notes), **(notes or {})})

    @staticmethod
    def load(path: PathLike, *, force: bool = False) -> Delta:
        """Reads what :meth:`save` wrote.

        Args:
            path: the file; it need not be trusted.
            force: also with values that are NaN or infinite.

        Raises:
            ValueError: the file is no delta, is damaged, or was written by a later version; or has such values.
        """
        delta = Delta(*delta_file.read(path))
        if not force:
            require_finite(delta, f"{path}: ")
        return delta

    def save(self, path: PathLike, *, originals: bool = False, force: bool = False) -> None:
        """Writes one safetensors file, atomically: a crash leaves the old file as it was.

        Args:
            path: the file.
            originals: also the entries of the base that are replaced, so that a checkpoint can be reverted by the file
                alone; up to twice the size.
            force: also values that are NaN or infinite.

        Raises:
            ValueError: originals that are not known; such values.
            TypeError: notes that JSON cannot hold.
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
        """Whether both set the same entries to the same bits; where they come from is not looked at."""
        if not isinstance(other, Delta):
            return NotImplemented
        return self.keys() == other.keys() and all(
            same(part.mask, other[name].mask) and same_bits(part.values, other[name].values)
            for name, part in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def trained_count(self) -> int:
        """How many scalars it sets."""
        return sum(part.mask.nnz for part in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes of values and packed indices: the file without names and checksum."""
        return sum(_bytes(part) for part in self.values())

    @property
    def masks(self) -> dict[str, Mask]:
        """The entries that it sets, by name."""
        return {name: part.mask for name, part in self.items()}

    def selection(self, model: nn.Module) -> Selection:
        """The selection that trains the same parameters, to go on training: ``attach(model, delta.selection(model))``,
        then ``load_delta(model, delta)``.

        Raises:
            ValueError: shapes differ.
        """
        sites_of({name: part for name, part in self.items() if name in named_parameters(model)}, model, force=True)
        masks = {
            name: self[name].mask if name in self else Frozen(tuple(parameter.shape), "not in the delta")
            for name, parameter in named_parameters(model).items()
        }
        known = {name: part.fingerprint for name, part in self.items() if name in masks and part.fingerprint}
        return Selection(masks, self.notes, known)

    def __str__(self) -> str:
        """A table with one line for each group of equal tensors; block numbers are written as ``*``."""
        keys = {
            name: (part.mask.shape, part.mask.label, "+".join(packed(part.mask)), part.values.dtype, part.mask.nnz)
            for name, part in self.items()
        }
        sizes = {keys[name]: _bytes(part) for name, part in self.items()}
        rows = [
            (
                name, shape_text(key[0]), key[1], key[2] or "-", str(key[3]).removeprefix("torch."),
                f"{key[4] * count:,}", f"{sizes[key] * count:,}",
            )
            for name, key, count in grouped(keys.items())
        ]  # fmt: skip
        lines = table(("tensor", "shape", "entries", "as", "values", "set", "bytes"), rows)
        lines.append(f"{self.trained_count():,} entries of {len(self)} tensors, {self.nbytes:,} bytes")
        lines += [f"{key}: {value}" for key, value in self.notes.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Delta({self.trained_count():,} entries of {len(self)} tensors, {self.nbytes:,} bytes)"

    # --- Two deltas

    def overlap(self, other: Delta, *, whole: bool = False) -> Overlap:
        """How many entries both set, in all and by tensor.

        Args:
            other: of the same model.
            whole: count also tensors that either sets whole, such as biases.

        Raises:
            ValueError: shapes differ.
        """
        return overlap(*paired(self.masks, other.masks), whole)

    def difference(self, other: Delta) -> Difference:
        """Shared entries, and those of them with other values, by tensor; printable.

        Raises:
            ValueError: shapes differ.
        """
        return difference(self, other)

    def __or__(self, other: Delta) -> Delta:
        if not isinstance(other, Delta):
            return NotImplemented
        return self.merged(other)

    def merged(self, other: Delta, *, wins: Literal["neither", "self", "other"] = "neither") -> Delta:
        """What both set; ``a | b`` is ``a.merged(b)``.

        Where they set different entries of one tensor, the digest of its base is lost, so that applying the result
        looks at whole tensors, which takes longer.

        Args:
            other: of the same base.
            wins: whose value is taken where both set an entry; "neither": their bits must be equal.

        Raises:
            ValueError: shapes or dtypes of tensors, or bases, differ; other values of the same entry, and neither wins.
        """
        parts = merged(self, other, wins)
        return Delta(parts, {"policy": f"[{self.notes.get('policy')}] or [{other.notes.get('policy')}]"})

    # --- Models

    def check(self, model: nn.Module) -> None:
        """Compares all touched tensors of a plain model with those that the delta was made on, by fingerprint.

        What :meth:`apply_` looks at is less: the entries that it replaces, and up to 32 more of each tensor.

        Raises:
            ValueError: they differ, in shape, dtype or values; or the delta does not know its base.
        """
        sites = sites_of(self, model, force=False)
        wrong = [site.name for site in sites if known_fingerprint(site.name, site.part) != fingerprint(site.tensor)]
        require_base(wrong, len(sites))

    def apply_(self, model: nn.Module, *, force: bool = False) -> Applied:
        """Writes the values to a plain model, in place, and keeps what they replace.

        Values of another dtype than the tensor's are rounded once. Parameters stay the same objects at the same place
        in memory, and code of torch.compile stays valid.

        Args:
            model: the base, wrapped or not; nobody else may use it in the meantime.
            force: also on another base, one in another dtype, or one that the delta does not know.

        Returns:
            What takes it back: ``.revert_()``.

        Raises:
            ValueError: another model or base, or an attached one; nothing has changed.
        """
        return Applied(self, model, force)

    @contextmanager
    def applied(self, model: nn.Module, *, force: bool = False) -> Iterator[Applied]:
        """``with delta.applied(model):``, see :meth:`apply_`; leaving it restores every byte."""
        handle = self.apply_(model, force=force)
        try:
            yield handle
        finally:
            handle.revert_()

    # --- PEFT

    def to_shira(self, folder: PathLike, *, base: Base | None = None, drop: bool = False) -> None:
        """Writes a SHiRA adapter of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

        SHiRA stores differences: base + difference is the value up to rounding, and cannot be undone to the bit.

        Args:
            folder: where to; it is created.
            base: the model, or its state_dict, where the delta does not keep originals.
            drop: leave out what SHiRA cannot hold, such as biases of adapted layers.

        Raises:
            ValueError: originals are not known; parameters that SHiRA cannot hold.
        """
        write_shira(self, Path(folder), base, drop)

    @staticmethod
    def from_shira(folder: PathLike, base: Base) -> Delta:
        """The delta that a SHiRA adapter of PEFT makes on a base model: base + difference, as PEFT would merge it.

        Args:
            folder: what PEFT's ``save_pretrained`` wrote.
            base: the plain model, or its state_dict.

        Raises:
            ValueError: no SHiRA adapter, or one of another model.
        """
        return Delta(read_shira(Path(folder), base), {"policy": f"SHiRA adapter {Path(folder).name}"})


def save_delta(
    model: nn.Module,
    path: PathLike,
    *,
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    selection: Selection | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Delta:
    """``Delta.of(model, ...)``, saved: see :meth:`Delta.of` and :meth:`Delta.save`, which have more options."""
    delta = Delta.of(model, dtype=dtype, base=base, selection=selection, notes=notes)
    delta.save(path)
    return delta


def load_delta(model: nn.Module, delta: Delta | PathLike, *, force: bool = False) -> Applied | None:
    """Puts a delta into a model.

    Args:
        model: the plain base, see :meth:`Delta.apply_`; or attached to the same entries (see :meth:`Delta.selection`):
            then values and weights are set, originals stay, and training can go on.
        delta: or its file.
        force: see :meth:`Delta.apply_`; of an attached model, the originals stay its own.

    Returns:
        What takes it back, for a plain model.

    Raises:
        ValueError: another model or base, or other entries; nothing has changed.
    """
    delta = delta if isinstance(delta, Delta) else Delta.load(delta, force=force)
    root = attached_root(model)
    if root is None:
        return delta.apply_(model, force=force)
    load_attached(delta, root, force)
    return None


def _bytes(part: Part) -> int:
    return part.values.nbytes + sum(tensor.nbytes for tensor in packed(part.mask).values())
