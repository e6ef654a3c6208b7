"""Selection: a mask for every parameter of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from gradsel import masks as kinds
from gradsel.attached import is_attached
from gradsel.masks import Frozen, Mask
from gradsel.parameters.fingerprints import fingerprint, kind_of
from gradsel.parameters.names import shaped_parameters, strip_wrappers
from gradsel.selection import file as selection_file
from gradsel.selection import shira
from gradsel.selection.distribution import Blocks
from gradsel.selection.overlap import Overlap, overlap, require_same_parameters
from gradsel.tables import grouped, printable, shape_text, table

_IMPORTED = {"policy": "imported"}
Given = TypeVar("Given")


class Selection(Mapping[str, Mask]):
    """A mask for every parameter of a model, frozen ones included, by name.

    ``a | b``, ``a & b`` and ``a - b`` combine two selections of one model, parameter by parameter. The result keeps the
    most regular kind of mask: whole rows combine to whole rows, and equally many entries per neuron to a mask per row.

    Attributes:
        notes: how it was made: policy, criterion, number of batches, memory, neurons that score zero.
        base: fingerprints of the weights it was made on, by name, as far as they are known.
    """

    def __init__(
        self,
        masks: Mapping[str, Mask],
        notes: Mapping[str, Any] | None = None,
        base: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            masks: by the names of the parameters.
            notes: anything that can be written as JSON.
            base: from :func:`gradsel.parameters.fingerprints.fingerprints`.
        """
        self._masks = dict(masks)
        self.notes = dict(notes or {})
        self.base = dict(base or {})

    @staticmethod
    def from_dense(masks: Mapping[str, Tensor]) -> Selection:
        """From boolean masks shaped like their parameters, as published code saves them.

        Like all imports, it recognises regular masks: equally many entries per neuron, whole rows, whole columns.

        Raises:
            TypeError: a mask is not bool.
        """
        shapes = {name: mask.shape for name, mask in masks.items()}
        return _imported(masks, shapes, lambda mask, shape: kinds.from_dense(mask))

    @staticmethod
    def from_bits(bits: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Selection:
        """From packed bitmasks; the inverse of :meth:`to_bits`.

        Args:
            bits: int32 [rows, ceil(cols / 32)] of each parameter flattened after its first dimension.
            shapes: the shapes of all parameters of the model; those without bits are frozen.

        Raises:
            TypeError, ValueError: bits have another dtype or shape, or belong to a parameter that ``shapes`` lacks.
        """
        return _imported(bits, shapes, kinds.from_bits)

    @staticmethod
    def from_coo(indices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Selection:
        """From the indices of sparse tensors; the inverse of :meth:`to_coo`.

        Args:
            indices: int64 or int32 [ndim, nnz] of each parameter, as ``torch.sparse_coo_tensor`` takes them, in any
                order; duplicates count once.
            shapes: the shapes of all parameters of the model; those without indices are frozen.

        Raises:
            TypeError, ValueError: indices have another dtype or shape, are out of range, or belong to a parameter that
                ``shapes`` lacks.
        """
        return _imported(indices, shapes, kinds.from_coo)

    @staticmethod
    def from_shira(peft_model: nn.Module, adapter: str = "default") -> Selection:
        """The masks of one of PEFT's SHiRA adapters, by the names that parameters have without PEFT.

        Parameters outside the adapter are frozen; PEFT's ``modules_to_save`` are trained whole.

        Args:
            peft_model: the result of ``get_peft_model`` or ``PeftModel.from_pretrained``.
            adapter: its name in PEFT.

        Raises:
            ValueError: no layer has this adapter.
        """
        return Selection(shira.masks_of(peft_model, adapter), {"policy": f"SHiRA adapter {adapter!r}"})

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Whether both select the same entries of the same parameters, in masks of the same kinds."""
        if not isinstance(other, Selection):
            return NotImplemented
        return self.keys() == other.keys() and all(kinds.same(mask, other[name]) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]

    def trainable_count(self) -> int:
        """The number of trained scalars: selected entries, biases, head."""
        return sum(mask.nnz for mask in self.values())

    def summary(self) -> str:
        """A table with one line per group of similar parameters; block numbers are written as ``*``."""
        groups = grouped((name, (mask.shape, mask.label, mask.nnz)) for name, mask in self.items())
        rows = [
            (
                name,
                shape_text(shape),
                "-" if nnz == 0 else label,
                f"{nnz * count:,}" if nnz else f"frozen: {label}",
            )
            for name, (shape, label, nnz), count in groups
        ]
        lines = table(("parameter", "shape", "mask", "trained"), rows)
        total = sum(mask.numel for mask in self.values())
        share = 100 * self.trainable_count() / max(total, 1)
        lines.append(f"{self.trainable_count():,} of {total:,} parameters trained ({share:.2f} %)")
        return "\n".join(lines + ([self._notes_text()] if self.notes else []))

    def __repr__(self) -> str:
        return f"Selection({self.trainable_count():,} trained of {len(self)} parameters)"

    def __str__(self) -> str:
        return self.summary()

    def _notes_text(self) -> str:
        return printable(", ".join(f"{key} {value}" for key, value in self.notes.items()))

    def by_block(self) -> Blocks:
        """What is trained in each block and type of matrix: a mapping by (block, type); printable."""
        return Blocks(self)

    def overlap(self, other: Selection, *, whole: bool = False) -> Overlap:
        """What two selections of one model have in common, in total and by parameter.

        Args:
            other: another selection, for example that of another task.
            whole: also count parameters that either trains whole, such as biases; they tend to outweigh the others.

        Raises:
            ValueError: they were made for different models.
        """
        self._require_same_model(other)
        return overlap(self, other, whole)

    def __or__(self, other: Selection) -> Selection:
        return self._combined(other, kinds.union, "or")

    def __and__(self, other: Selection) -> Selection:
        return self._combined(other, kinds.intersection, "and")

    def __sub__(self, other: Selection) -> Selection:
        return self._combined(other, kinds.difference, "without")

    def _combined(self, other: Selection, operation: Callable[[Mask, Mask], Mask], word: str) -> Selection:
        if not isinstance(other, Selection):
            return NotImplemented
        self._require_same_model(other)
        masks = {name: operation(mask, other[name]) for name, mask in self.items()}
        base = {**other.base, **self.base}
        agreed = {name: text for name, text in base.items() if other.base.get(name, text) == text}
        return Selection(masks, {"policy": f"[{self._notes_text()}] {word} [{other._notes_text()}]"}, agreed)

    def _require_same_model(self, other: Selection) -> None:
        require_same_parameters(self._shapes(), other._shapes(), "this selection", "the other")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: mask.shape for name, mask in self.items()}

    def to_bits(self) -> dict[str, Tensor]:
        """Packed bitmasks, int32 [rows, ceil(cols / 32)], of all parameters flattened after their first dimension."""
        return {name: mask.to_bits() for name, mask in self.items()}

    def to_coo(self) -> dict[str, Tensor]:
        """Indices for ``torch.sparse_coo_tensor``, int64 [ndim, nnz] in row-major order, of all parameters."""
        return {name: kinds.to_coo(mask) for name, mask in self.items()}

    def shira_mask_fn(self, model: nn.Module) -> shira.MaskFunction:
        """The ``mask_fn`` that makes PEFT's SHiRA train the selected entries of its target modules.

        ::

            config = ShiraConfig(r=2, mask_type="gradsel", target_modules=[...])
            config.mask_fn = selection.shira_mask_fn(model)
            peft_model = get_peft_model(model, config)

        PEFT gives every target layer exactly ``r * (in + out)`` entries. For a layer with another number of selected
        entries, the function raises a ValueError.

        Args:
            model: the model that is passed to PEFT, not a copy.
        """
        return shira.mask_function(self, model)

    def check(self, model: nn.Module, values: bool = True) -> None:
        """Checks that the selection was made for this model.

        Args:
            model: not attached, and not wrapped by PEFT.
            values: also compare weights with their fingerprints in :attr:`base`, except those that are trained whole,
                such as a new head, or have another dtype now.

        Raises:
            ValueError: parameters are missing or unknown, or have other shapes or values.
        """
        if is_attached(model):
            raise ValueError("the model is attached to a selection; call gradsel.detach(model) before checking another")
        parameters = shaped_parameters(model)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        require_same_parameters(self._shapes(), shapes, "the selection", "the model")
        if not values:
            return
        compared = [
            name
            for name, text in self.base.items()
            if name in self and not self[name].is_whole and text.startswith(f"{kind_of(parameters[name])} ")
        ]
        other = [name for name in compared if fingerprint(parameters[name]) != self.base[name]]
        if other:
            raise ValueError(
                f"{len(other)} of {len(compared)} ranked and frozen parameters differ from the weights this selection "
                f"was made on, first {other[0]}: pass values=False if that is intended"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically: each mask in its smallest encoding, the rest as JSON metadata."""
        selection_file.write(path, self, self.notes, self.base)

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Selection:
        """Reads what :meth:`save` wrote.

        Args:
            path: the file, which may be untrusted.
            model: the model to check the selection against; see :meth:`check`.

        Raises:
            ValueError: the file is not a selection, is damaged, or was written by a later version; or the selection is
                for another model.
        """
        selection = Selection(*selection_file.read(path))
        if model is not None:
            selection.check(model)
        return selection


def _imported(
    given: Mapping[str, Given],
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[Given, Sequence[int]], Mask],
) -> Selection:
    if unknown := [name for name in given if name not in shapes]:
        raise ValueError(f"no shape is given for {len(unknown)} parameters, first {unknown[0]}")
    masks: dict[str, Mask] = {}
    for name, shape in shapes.items():
        try:
            masks[name] = read(given[name], shape) if name in given else Frozen(shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return Selection(masks, _IMPORTED)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Sets ``requires_grad`` to True for parameters with selected entries and to False for all others.

    For training with dense gradients: backward then skips frozen parameters.

    Raises:
        KeyError: the selection lacks a parameter of the model; no flag has changed.
    """
    parameters = dict(model.named_parameters())
    masks = {name: lookup(selection, name) for name in parameters}
    for name, parameter in parameters.items():
        parameter.requires_grad_(masks[name].nnz > 0)


def lookup(selection: Mapping[str, Mask], name: str) -> Mask:
    """The mask of a parameter whose name may carry the prefixes of DistributedDataParallel or torch.compile."""
    for candidate in (name, strip_wrappers(name)):
        if candidate in selection:
            return selection[candidate]
    raise KeyError(
        f"the selection has no parameter {name!r}; it was made for another model (it has {len(selection)}, "
        f"the first is {next(iter(selection), 'none')!r})"
    )
