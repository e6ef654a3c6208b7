"""The file format of selections: safetensors with JSON metadata, untrusted when read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gradsel.masks import Mask, from_parts
from gradsel.sealed import by_parameter, json_object, reading_sealed, write_sealed

_FORMAT = "gradsel.selection"
_VERSION = "1"


class Content(NamedTuple):
    """The contents of a file: the arguments of :class:`~gradsel.selection.Selection`."""

    masks: dict[str, Mask]
    notes: dict[str, Any]
    base: dict[str, str]


def write(
    path: str | os.PathLike[str], masks: Mapping[str, Mask], notes: Mapping[str, Any], base: Mapping[str, str]
) -> None:
    """Writes one file, atomically: each mask in its smallest encoding, the rest as JSON, and a checksum of all."""
    tensors = {}
    parameters = {}
    for name, mask in masks.items():
        parameters[name] = {"kind": mask.kind, "shape": list(mask.shape), **mask.describe()}
        for part, tensor in mask.packed().items():
            tensors[f"{name}:{part}"] = tensor
    write_sealed(path, _FORMAT, _VERSION, {"parameters": parameters, "notes": notes, "base": base}, tensors)


def read(path: str | os.PathLike[str]) -> Content:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: the file is not a selection, is damaged, or was written by a later version.
    """
    with reading_sealed(path, _FORMAT, _VERSION, "a selection") as (metadata, tensors):
        content = Content(
            _masks(json_object(metadata, "parameters"), tensors),
            json_object(metadata, "notes"),
            json_object(metadata, "base"),
        )
        if not all(isinstance(text, str) for text in content.base.values()):
            raise ValueError("fingerprints must be strings")
    return content


def _masks(parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Mask]:
    parts = by_parameter(tensors)
    masks = {}
    for name, described in parameters.items():
        try:
            masks[name] = from_parts(described["kind"], described["shape"], described, parts.pop(name, {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    if parts:
        raise ValueError(f"tensors of unknown parameters: {', '.join(parts)}")
    return masks
