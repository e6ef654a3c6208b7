"""Selection: a mask for every parameter of a model, and the file it is kept in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradsel.masks import Flat, Mask, from_parts
from gradsel.rules import strip_wrappers
from gradsel.tables import grouped, shape_text, table

_FORMAT = "gradsel.selection"
_FORMAT_VERSION = 1


class Selection(Mapping[str, Mask]):
    """A mask for every parameter of a model, by name; frozen ones included.

    Attributes:
        notes: how it was made: policy, criterion, number of batches, rows whose gradient was zero.
    """

    def __init__(self, masks: Mapping[str, Mask], notes: Mapping[str, Any] | None = None) -> None:
        self._masks = dict(masks)
        self.notes = dict(notes or {})

    @staticmethod
    def from_dense(masks: Mapping[str, Tensor]) -> Selection:
        """From boolean masks shaped like their parameters, such as published code saves."""
        return Selection({name: Flat.from_dense(mask) for name, mask in masks.items()}, {"policy": "imported"})

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def trainable_count(self) -> int:
        """Trained scalars in all: selected entries, biases, head."""
        return sum(mask.nnz for mask in self.values())

    def summary(self) -> str:
        """A table with one line for each group of equal parameters; block numbers are written as ``*``."""
        groups = grouped((name, (mask.shape, mask.how, mask.nnz)) for name, mask in self.items())
        rows = [
            (
                name,
                shape_text(shape),
                "-" if nnz == 0 else how,
                f"{nnz * count:,}" if nnz else f"frozen: {how}",
            )
            for name, (shape, how, nnz), count in groups
        ]
        lines = table(("parameter", "shape", "mask", "trained"), rows)
        total = sum(math.prod(mask.shape) for mask in self.values())
        share = 100 * self.trainable_count() / max(total, 1)
        lines.append(f"{self.trainable_count():,} of {total:,} parameters trained ({share:.2f} %)")
        how = ", ".join(f"{key} {value}" for key, value in self.notes.items())
        return "\n".join(lines + ([how] if how else []))

    def __repr__(self) -> str:
        return f"Selection({self.trainable_count():,} trained of {len(self)} parameters)"

    def __str__(self) -> str:
        return self.summary()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically: the tensors of the masks, and the rest as JSON metadata."""
        tensors = {}
        parameters = {}
        for name, mask in self.items():
            parameters[name] = {"kind": mask.kind, "shape": list(mask.shape), **mask.describe()}
            for part, tensor in mask.tensors().items():
                tensors[f"{name}:{part}"] = tensor.cpu().clone()  # two names may share one mask
        metadata = {
            "format": _FORMAT,
            "version": str(_FORMAT_VERSION),
            "parameters": json.dumps(parameters),
            "notes": json.dumps(self.notes),
        }
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, unfinished, metadata)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Selection:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is not a selection, is damaged, or was written by a later version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is not a selection: its format is {metadata.get('format')!r}, expected {_FORMAT!r}"
            )
        if metadata.get("version") != str(_FORMAT_VERSION):
            raise ValueError(
                f"{path} is of version {metadata.get('version')}; this library reads {_FORMAT_VERSION}, update it"
            )
        try:
            masks = {}
            for name, described in json.loads(metadata["parameters"]).items():
                parts = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.rpartition(":")[0] == name}
                masks[name] = from_parts(described["kind"], described["shape"], described, parts)
            return Selection(masks, json.loads(metadata["notes"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from None


def freeze(model: nn.Module, selection: Selection) -> None:
    """Sets ``requires_grad`` as a selection says: True where anything is selected, False elsewhere.

    For training with dense gradients; backward then skips the gradients of frozen parameters.

    Raises:
        KeyError: a parameter the selection does not know; no flag has changed.
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
        f"the selection has no parameter {name!r}; it was made for another model (it knows {len(selection)}, "
        f"the first is {next(iter(selection), 'none')!r})"
    )
