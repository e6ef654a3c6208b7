"""An update of weights as bytes, in the safetensors format, and its checksum."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

_FORMAT, _VERSION = "gradsel.patches", 1
#: Name, shape, dtype, values, indices.
Fields = tuple[str, tuple[int, ...], torch.dtype, Tensor, Tensor | None]


def packed(patches: Iterable[Fields], header: Mapping[str, Any]) -> bytes:
    """The patches and a header of JSON in one piece."""
    tensors: dict[str, Tensor] = {}
    about = []
    for number, (name, shape, dtype, values, indices) in enumerate(patches):
        about.append([name, list(shape), str(dtype).removeprefix("torch.")])
        tensors[f"{number}.values"] = values.cpu()
        if indices is not None:
            tensors[f"{number}.indices"] = indices.cpu()
    text = json.dumps({**header, "format": _FORMAT, "version": _VERSION, "patches": about})
    return safetensors.torch.save(tensors, {"update": text})


def unpacked(data: bytes) -> tuple[list[Fields], dict[str, Any]]:
    """The inverse of :func:`packed`.

    Raises:
        ValueError: these bytes are no update.
    """
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["update"])
        if header["format"] != _FORMAT or header["version"] != _VERSION:
            raise ValueError(f"{header['format']} {header['version']}, expected {_FORMAT} {_VERSION}")
        return [_fields(number, about, tensors) for number, about in enumerate(header["patches"])], header
    except (ValueError, LookupError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{len(data):,} bytes are no update of weights: {error}") from None


def _fields(number: int, about: Any, tensors: Mapping[str, Tensor]) -> Fields:
    name, shape, dtype = about
    values, indices = tensors[f"{number}.values"], tensors.get(f"{number}.indices")
    count = math.prod(shape)
    kind = getattr(torch, dtype, None)
    if not isinstance(name, str) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name!r} {shape} is no tensor")
    if values.dtype is not kind or values.ndim != 1:
        raise ValueError(f"{name}: values are {values.dtype} {list(values.shape)}, expected a vector of {kind}")
    if indices is None:
        if values.numel() != count:
            raise ValueError(f"{name}: {values.numel()} values for {count} entries")
        return name, tuple(shape), kind, values, None
    if indices.dtype not in (torch.int32, torch.int64) or indices.shape != values.shape:
        raise ValueError(f"{name}: indices are {indices.dtype} {list(indices.shape)} for {values.numel()} values")
    outside = indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= count)
    if outside or bool((indices.diff() <= 0).any()):
        raise ValueError(f"{name}: indices do not ascend within {count} entries")
    return name, tuple(shape), kind, values, indices


def checksum(patches: Iterable[Fields], run: str, sequence: int, before: str) -> str:
    """SHA-256 of an update and, by their checksum, of all updates before it."""
    found = hashlib.sha256(json.dumps([_FORMAT, _VERSION, run, sequence, before]).encode())
    for name, shape, dtype, values, indices in sorted(patches, key=lambda patch: patch[0]):
        found.update(json.dumps([name, list(shape), str(dtype), indices is None, values.numel()]).encode())
        for tensor in (values, indices):
            if tensor is not None and tensor.numel():
                found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
