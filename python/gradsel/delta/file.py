"""The file format of deltas: safetensors with JSON metadata, untrusted; docs/deltas.md describes every byte."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsel.delta.coding import packed, unpacked
from gradsel.delta.parts import Part
from gradsel.sealed import by_parameter, json_object, reading_sealed, write_sealed

FORMAT = "gradsel.delta"
VERSION = "1"
#: Of files with differences, which older readers would take for values.
WITH_DIFFERENCES = "2"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Checks that a delta can hold entries of a tensor.

    Raises:
        ValueError: it cannot: float8, complex and unsigned numbers above 8 bits have no arithmetic in torch, or none
            that is the same everywhere.
    """
    if dtype not in _DTYPES.values():
        raise ValueError(
            f"{name} is {str(dtype).removeprefix('torch.')}, and deltas hold {', '.join(_DTYPES)}; cast the model, or "
            "leave this tensor as it is in the base"
        )


def write(
    path: str | os.PathLike[str], parts: Mapping[str, Part], notes: Mapping[str, Any], originals: bool = False
) -> None:
    """Writes one file, atomically, with ``originals`` also the replaced entries.

    Raises:
        ValueError: the original entries are not known, or a dtype cannot be saved.
        TypeError: the notes cannot be written as JSON.
    """
    tensors: dict[str, Tensor] = {}
    parameters = {}
    for name, part in parts.items():
        require_dtype(name, part.dtype)
        require_dtype(name, part.values.dtype)
        parameters[name] = {
            "kind": part.mask.kind,
            "shape": list(part.mask.shape),
            **part.mask.describe(),
            "dtype": str(part.dtype).removeprefix("torch."),
            "digest": part.digest,
            "fingerprint": part.fingerprint,
            **({"differences": part.differences} if part.differences else {}),
        }
        kept = packed(part.mask) | {"values": part.values}
        if originals and not part.differences:  # of which zero is the original
            if part.originals is None:
                raise ValueError(f"the original entries of {name} are not known, so they cannot be saved")
            kept["originals"] = part.originals
        tensors |= {f"{name}:{key}": tensor for key, tensor in kept.items()}
    version = WITH_DIFFERENCES if any(part.differences for part in parts.values()) else VERSION
    write_sealed(path, FORMAT, version, {"parameters": parameters, "notes": notes}, tensors)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Part], dict[str, Any]]:
    """Reads the parts and notes that :func:`write` wrote.

    Raises:
        ValueError: the file is not a delta, is damaged, or was written by a later version.
    """
    with reading_sealed(path, FORMAT, VERSION, "a delta", later=(WITH_DIFFERENCES,)) as (metadata, tensors):
        owned = by_parameter(tensors)
        parameters = json_object(metadata, "parameters")
        if unknown := [name for name in owned if name not in parameters]:
            raise ValueError(f"tensors of unknown parameters: {', '.join(unknown)}")
        parts = {name: _named(name, described, owned.get(name, {})) for name, described in parameters.items()}
        notes = json_object(metadata, "notes")
    return parts, notes


def _named(name: str, described: Mapping[str, Any], tensors: dict[str, Tensor]) -> Part:
    try:
        return _part(described, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _part(described: Mapping[str, Any], tensors: dict[str, Tensor]) -> Part:
    values, originals = tensors.pop("values"), tensors.pop("originals", None)
    mask = unpacked(described["kind"], described["shape"], described, tensors)
    dtype, digest, fingerprint = _DTYPES[described["dtype"]], described["digest"], described["fingerprint"]
    if not mask.nnz:
        raise ValueError("no entries")  # the other size could be anything
    if values.dtype not in _DTYPES.values() or (values.dtype is not dtype and not _are_floats(values.dtype, dtype)):
        raise TypeError(f"values are {values.dtype} for a tensor of {dtype}")
    if originals is not None and originals.dtype is not dtype:
        raise TypeError(f"originals are {originals.dtype} for a tensor of {dtype}")
    for what, tensor in (("values", values), ("originals", originals)):
        if tensor is not None and tuple(tensor.shape) != mask.compact_shape:
            raise ValueError(f"{what} must be {list(mask.compact_shape)}, got {list(tensor.shape)}")
    differences = described.get("differences", "")
    if not isinstance(digest, str) or not isinstance(fingerprint, str):
        raise TypeError("digest and fingerprint must be strings")
    if not isinstance(differences, str):
        raise TypeError(f"differences must be the name of a format, got {differences!r}")
    return Part(mask, values, dtype, digest, fingerprint, originals, differences)


def _are_floats(*dtypes: torch.dtype) -> bool:
    return all(dtype.is_floating_point for dtype in dtypes)
