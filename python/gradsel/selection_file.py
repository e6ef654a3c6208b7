"""The file of a selection: safetensors with JSON metadata. What is read is not trusted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import gradsel_kernels as gk
from gradsel.masks import Mask, from_parts

_FORMAT = "gradsel.selection"
_VERSION = "1"

#: What Python and torch raise on input that makes no sense; RecursionError is a RuntimeError.
_NONSENSE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)


class Content(NamedTuple):
    """What a file holds; the arguments of :class:`~gradsel.selection.Selection`."""

    masks: dict[str, Mask]
    notes: dict[str, Any]
    base: dict[str, str]


def write(
    path: str | os.PathLike[str], masks: Mapping[str, Mask], notes: Mapping[str, Any], base: Mapping[str, str]
) -> None:
    """Writes one file, atomically: each mask in its smallest form, the rest as JSON, and a checksum over both."""
    tensors = {}
    parameters = {}
    for name, mask in masks.items():
        parameters[name] = {"kind": mask.kind, "shape": list(mask.shape), **mask.describe()}
        for part, tensor in mask.packed().items():
            tensors[f"{name}:{part}"] = tensor.cpu().contiguous().clone()  # two names may share one mask
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "library": gk.__version__,
        "parameters": json.dumps(parameters),
        "notes": json.dumps(notes),
        "base": json.dumps(base),
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> Content:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: the file is not a selection, is damaged, or was written by a later version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, *_NONSENSE) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a selection: its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
    if metadata.get("version") != _VERSION:
        raise ValueError(f"{path} is of version {metadata.get('version')}; this library reads {_VERSION}, update it")
    try:
        content = Content(
            _masks(_object(metadata, "parameters"), tensors), _object(metadata, "notes"), _object(metadata, "base")
        )
        if not all(isinstance(text, str) for text in content.base.values()):
            raise ValueError("fingerprints are texts")
        if metadata["checksum"] != _checksum(metadata, tensors):
            raise ValueError("the checksum does not match")
    except _NONSENSE as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    return content


def _masks(parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Mask]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(":")
        parts.setdefault(name, {})[part] = tensor
    masks = {}
    for name, described in parameters.items():
        try:
            masks[name] = from_parts(described["kind"], described["shape"], described, parts.pop(name, {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    if parts:
        raise ValueError(f"tensors of unknown parameters: {', '.join(parts)}")
    return masks


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    value = json.loads(metadata[key])
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a JSON object, got a {type(value).__name__}")
    return value


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata but itself, and of the tensors' keys, dtypes, shapes and bytes, all in sorted order."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
