"""Sealed files: safetensors with JSON metadata and a checksum of both, written atomically, untrusted when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import gradsel_kernels as gk
from gradsel.files import replacing
from gradsel.tensor_files import MALFORMED, raw, read_header, read_tensors, save_file


def write_sealed(
    path: str | os.PathLike[str],
    format: str,
    version: str,
    sections: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes tensors and JSON sections as one safetensors file, atomically, with a checksum of both.

    Raises:
        TypeError: a section cannot be written as JSON.
        OSError: the file cannot be written.
    """
    metadata = {"format": format, "version": version, "library": gk.__version__}
    metadata |= {key: json.dumps(section) for key, section in sections.items()}
    metadata["checksum"] = _checksum(metadata, tensors)
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata)


@contextmanager
def reading_sealed(
    path: str | os.PathLike[str], format: str, version: str, what: str, later: Collection[str] = ()
) -> Iterator[tuple[dict[str, str], dict[str, Tensor]]]:
    """Yields the metadata and tensors that :func:`write_sealed` wrote. Errors inside are reported as a damaged file.

    The checksum is compared last, because other errors say more precisely what is wrong.

    Args:
        what: what the file should be, for messages: ``"a selection"``.
        later: other versions that can be read.

    Raises:
        ValueError: the file has another format, is damaged, or was written by a later version.
    """
    with open(path, "rb") as stream:
        try:
            header = read_header(stream)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from None
        metadata = header.metadata
        if metadata.get("format") != format:
            raise ValueError(f"{path} is not {what}: its format is {metadata.get('format')!r}, expected {format!r}")
        if metadata.get("version") not in (version, *later):
            found, readable = metadata.get("version"), " and ".join((version, *later))
            raise ValueError(f"{path} is of version {found}; this library reads {readable}, update it")
        try:
            tensors = read_tensors(stream, header)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from None
    try:
        yield metadata, tensors
        if metadata["checksum"] != _checksum(metadata, tensors):
            raise ValueError("the checksum does not match")
    except MALFORMED as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


def by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups the tensors of a file, whose keys are ``name:part``, by name and part."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(":")
        found.setdefault(name, {})[part] = tensor
    return found


def json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """A section of the metadata that must be a JSON object."""
    value = json.loads(metadata[key])
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a JSON object, got a {type(value).__name__}")
    return value


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all other metadata and of the tensors' keys, dtypes, shapes and bytes, all in sorted order."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(raw(tensor))
    return digest.hexdigest()
