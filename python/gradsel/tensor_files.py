"""safetensors files: read without mapping them into memory, and written with the same bytes every time.

A mapped file that somebody else shortens or rewrites kills the process that reads it, or changes tensors after they
were checked. What is read here is a copy. The library safetensors decides about dtypes and whole files.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

#: What Python and torch raise on malformed input; RecursionError is a RuntimeError.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)
#: Bytes of a header, at most, as in the library.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        dtype: as safetensors names it.
        start, end: where its bytes are in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        tensors: by name, in the order of the header.
    """

    metadata: dict[str, str]
    tensors: dict[str, Entry]


def read_header(stream: BinaryIO) -> Header:
    """Reads the beginning of a file.

    Raises:
        ValueError: it is not a file of safetensors, or tensors overlap, leave gaps, or do not fit the file.
    """
    try:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(0)
        (length,) = struct.unpack("<Q", _exactly(stream, 8))
        if length > min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        described = json.loads(_exactly(stream, length).decode(), object_pairs_hook=_without_duplicates)
        metadata = described.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata must be strings")
        tensors = {name: _entry(about, 8 + length) for name, about in described.items()}
        end = 8 + length
        for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
            if entry.start != end or entry.end < end:
                raise ValueError("tensors overlap or leave gaps")
            end = entry.end
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file has {size}")
    except (struct.error, *MALFORMED) as error:
        raise ValueError(f"not a readable safetensors file: {error}") from None
    return Header(metadata, tensors)


def read_tensor(stream: BinaryIO, entry: Entry) -> Tensor:
    """Reads one tensor.

    Raises:
        ValueError: the file has become shorter since its header was read, or the tensor is damaged.
    """
    try:
        dtype = dtype_of(entry.dtype)
        tensor = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        stream.seek(entry.start)
        if stream.readinto(tensor.numpy()) != tensor.numel():  # type: ignore[attr-defined]
            raise ValueError("the file has become shorter while it was read")
        return tensor.view(dtype).reshape(entry.shape)
    except (SafetensorError, *MALFORMED) as error:
        raise ValueError(f"not a readable safetensors file: {error}") from None


def read_tensors(stream: BinaryIO, header: Header) -> dict[str, Tensor]:
    """Reads all tensors of a small file; the library checks it as a whole.

    Raises:
        ValueError: the file is damaged, or was changed since its header was read.
    """
    try:
        stream.seek(0)
        data = stream.read(max((entry.end for entry in header.tensors.values()), default=None) or -1)
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        if tensors.keys() != header.tensors.keys():
            raise ValueError("the file was changed while it was read")
    except (SafetensorError, AssertionError, *MALFORMED) as error:
        raise ValueError(f"not a readable safetensors file: {error}") from None
    return tensors


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not a file of safetensors; the message names it.
    """
    try:
        with open(path, "rb") as stream:
            return read_tensors(stream, read_header(stream))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def save_file(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file whose bytes depend on nothing but the arguments, one tensor after the other.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor is one of several in disguise, such as a quantised weight of torchao.
    """
    for name, tensor in tensors.items():
        if hasattr(type(tensor), "__tensor_flatten__"):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}, which a safetensors file does not hold as one tensor: make the "
                "model dense by gradsel.merge(model, dtype) first, or save it by the library that quantised it"
            )
    entries = {name: (name_of(t.dtype), tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    with open(path, "wb") as stream:
        for name in write_header(stream, entries, metadata or {}):
            stream.write(raw(tensors[name]))


def write_header(
    stream: BinaryIO, entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> Iterable[str]:
    """Writes the header of a file.

    Args:
        entries: dtype as safetensors names it, shape and number of bytes of each tensor, by name.

    Returns:
        The names of the tensors in the order in which their bytes must follow.
    """
    described: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = sorted(entries, key=lambda name: (-dtype_of(entries[name][0]).itemsize, name))  # so each is aligned
    end = 0
    for name in order:
        dtype, shape, size = entries[name]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    return order


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major, as files have them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@cache
def dtype_of(name: str) -> torch.dtype:
    """The dtype that safetensors calls so."""
    text = json.dumps({"x": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}).encode()
    return safetensors.torch.load(struct.pack("<Q", len(text)) + text)["x"].dtype


@cache
def name_of(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    data = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    return str(json.loads(data[8:])["x"]["dtype"])


def _entry(about: dict[str, Any], begin: int) -> Entry:
    shape, (start, end) = about["shape"], about["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in [*shape, start, end]):
        raise ValueError("shapes and offsets must be integers from 0")
    if not isinstance(about["dtype"], str) or math.prod(shape) >= 2**63:
        raise ValueError("a dtype that is no name, or a shape with 2**63 entries")
    return Entry(about["dtype"], tuple(shape), begin + start, begin + end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise ValueError("the file is cut off")
    return data
