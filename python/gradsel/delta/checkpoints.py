"""Checkpoints in safetensors files, single or in shards: read tensor by tensor, and copied with tensors changed."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradsel.sealed import replacing

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from its file on access.

    Args:
        path: a ``.safetensors`` file, an index ``*.safetensors.index.json`` of shards, or a folder with
            ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        ValueError: a file does not exist or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            path = next((path / name for name in (_INDEX, _SINGLE) if (path / name).exists()), path / _SINGLE)
        self.path = path
        self.index: dict[str, Any] | None = _index(path) if path.suffix == ".json" else None
        names = {path.name} if self.index is None else dict.fromkeys(self.index["weight_map"].values())
        self.shards = {path.with_name(name): _names(path.with_name(name)) for name in names}
        self._files = {name: file for file, names in self.shards.items() for name in names}

    def __getitem__(self, name: str) -> Tensor:
        """A copy of the tensor, in its own memory."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, from the headers of the files."""
        found: dict[str, tuple[int, ...]] = {}
        for path, names in self.shards.items():
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        return found

    @property
    def files(self) -> list[Path]:
        """All files that it is read from, an index included."""
        return [*self.shards, *([] if self.index is None else [self.path])]

    @property
    def nbytes(self) -> int:
        """Size of its files in bytes."""
        return sum(file.stat().st_size for file in self.shards)


def require_no_overwrite(output: Path, inputs: Iterable[Path]) -> None:
    """Checks that an output file does not replace one of the files it is made from.

    Raises:
        ValueError: it would.
    """
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"{output} would replace {path}, which it is made from; name another file")


def rewrite(source: Checkpoint, target: Path, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> list[Path]:
    """Copies a checkpoint with some of its tensors changed. These keep their shapes and dtypes.

    Args:
        target: the file to write; for a sharded checkpoint, the folder or the index.
        changes: by name, a function from the old to the new tensor. One tensor is in memory at a time.

    Returns:
        The files that were written, each atomically, the index last.

    Raises:
        ValueError: a file would replace one of ``source``.
    """
    files, index = _targets(source, target)
    for new in (*files.values(), *([] if index is None else [index])):
        require_no_overwrite(new, source.files)
    for old, new in files.items():
        new.parent.mkdir(parents=True, exist_ok=True)
        with replacing(new) as unfinished:
            shutil.copyfile(old, unfinished)
            with open(unfinished, "r+b") as stream:
                starts = _starts(stream)
                for name in source.shards[old]:
                    if name in changes:
                        stream.seek(starts[name])
                        stream.write(_raw(changes[name](source[name])))
    if index is not None:
        with replacing(index) as unfinished:
            shutil.copyfile(source.path, unfinished)
    return [*files.values(), *([] if index is None else [index])]


def _targets(source: Checkpoint, target: Path) -> tuple[dict[Path, Path], Path | None]:
    if source.index is None:
        return {source.path: target / source.path.name if target.is_dir() else target}, None
    index = target if target.suffix == ".json" else target / source.path.name
    return {file: index.with_name(file.name) for file in source.shards}, index


def _index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
        files = set(index["weight_map"].values())
        if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise ValueError("weight_map must name files in the same folder")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error}") from None
    return dict(index)


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None


def _starts(stream: BinaryIO) -> dict[str, int]:
    """Where the tensors of a file begin; they follow the length of the header (8 bytes) and the header (JSON)."""
    (length,) = struct.unpack("<Q", stream.read(8))
    header = json.loads(stream.read(length))
    return {name: 8 + length + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
