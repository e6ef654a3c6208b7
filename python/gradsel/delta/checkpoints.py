"""Checkpoints in safetensors files, single or in shards: read tensor by tensor, and copied with tensors changed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gradsel.attached import SUFFIX
from gradsel.files import replacing_all
from gradsel.tensor_files import Header, name_of, raw, read_header, read_tensor, write_header

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
#: Files of weights, which are not copied beside a new checkpoint.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".onnx", ".gguf", ".tflite", ".ot", ".delta",
)  # fmt: skip
#: What a Trainer saves beside a checkpoint to resume training; of no use beside other weights.
_OF_TRAINING = ("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")

Change = Callable[[Tensor], Tensor]


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from its file on access.

    Args:
        path: a ``.safetensors`` file, an index ``*.safetensors.index.json`` of shards, or a folder with
            ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        ValueError: a file does not exist or cannot be read; two shards have a tensor of the same name; or the index
            names a tensor that its file does not have.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else None
        if path.is_dir():
            path = next((path / name for name in (_INDEX, _SINGLE) if (path / name).exists()), path / _SINGLE)
        self.path = path
        self.index: dict[str, Any] | None = _index(path) if path.suffix == ".json" else None
        names = {path.name} if self.index is None else dict.fromkeys(self.index["weight_map"].values())
        self._identities: dict[Path, tuple[int, ...]] = {}
        self.shards = {path.with_name(name): self._header(path.with_name(name)) for name in names}
        self._files: dict[str, Path] = {}
        for file, header in self.shards.items():
            for name in header.tensors:
                other = self._files.setdefault(name, file)
                if other is not file:
                    raise ValueError(f"{name} is in {other.name} and in {file.name}; a tensor has one place")
        for name, shard in ({} if self.index is None else self.index["weight_map"]).items():
            if self._files.get(name) != path.with_name(shard):
                raise ValueError(f"{path} says that {name} is in {shard}, and it is not")

    def __getitem__(self, name: str) -> Tensor:
        """A copy of the tensor, in its own memory.

        Raises:
            ValueError: its file has been replaced or changed since it was opened first.
        """
        file = self._files[name]
        with self.open(file) as stream:
            return _named(file, lambda: read_tensor(stream, self.shards[file].tensors[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @contextmanager
    def open(self, file: Path) -> Iterator[BinaryIO]:
        """One of its files.

        Raises:
            ValueError: it has been replaced or changed since it was opened first, before or during the block.
        """
        with open(file, "rb") as stream:
            self._require_unchanged(file, stream)
            yield stream
            self._require_unchanged(file, stream)

    def without_values(self, base: Checkpoint) -> Checkpoint:
        """This checkpoint without the ``<name>_values`` of an attached model: their weights hold them, rounded.

        Args:
            base: what the model was before; what has such a name there is no values.

        Raises:
            ValueError: the weights do not hold the values.
        """
        plain = copy.copy(self)
        dropped = set()
        for name in self:
            weights = self._weights_of(name) if name.endswith(SUFFIX) and name not in base else []
            if not weights:
                continue
            own = self[name].reshape(-1)
            missing = ~own.isnan()
            for weight in weights:
                entries = self[weight]
                missing &= ~torch.isin(own.to(entries.dtype), entries)
            if count := int(missing.sum()):
                raise ValueError(
                    f"{count} of {own.numel()} entries of {name} are not in {weights[0]} in {self.path}, although they "
                    "should be its trained values: save the model again, after gradsel.sync(model)"
                )
            dropped.add(name)
        plain._files = {name: file for name, file in self._files.items() if name not in dropped}
        return plain

    def _weights_of(self, values: str) -> list[str]:
        """The weight of some values or, where checkpoints have it in pieces (experts), all tensors beside it."""
        weight = values.removesuffix(SUFFIX)
        if weight in self:
            return [weight]
        beside = weight.rpartition(".")[0] + "."
        return [name for name in self if name.startswith(beside) and not name.endswith(SUFFIX)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, from the headers of the files."""
        return {name: self.shards[file].tensors[name].shape for name, file in self._files.items()}

    @property
    def files(self) -> list[Path]:
        """All files that it is read from, an index included."""
        return [*self.shards, *([] if self.index is None else [self.path])]

    @property
    def nbytes(self) -> int:
        """Size of its files in bytes."""
        return sum(file.stat().st_size for file in self.shards)

    def _require_unchanged(self, file: Path, stream: BinaryIO) -> None:
        if self._identities[file] != _identity(stream):
            raise ValueError(f"{file} was changed while it was read; try again when nobody writes to it")

    def _header(self, file: Path) -> Header:
        try:
            with open(file, "rb") as stream:
                self._identities[file] = _identity(stream)
                return _named(file, lambda: read_header(stream))
        except FileNotFoundError:
            raise ValueError(f"there is no file or folder {file}") from None
        except OSError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None


def require_no_overwrite(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Checks that no output file replaces one of the files it is made from.

    Raises:
        ValueError: one would.
    """
    inputs = list(inputs)
    for output in outputs:
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                raise ValueError(f"{output} would replace {path}, which it is made from; name another file")


def rewrite(
    source: Checkpoint,
    target: Path,
    changes: Mapping[str, Change],
    added: Mapping[str, Tensor],
    config: Path | None = None,
) -> list[Path]:
    """Copies a checkpoint with some of its tensors changed, and others added or replaced by ones of another shape.

    A checkpoint in a folder becomes a folder, with everything that is there beside the weights.

    Args:
        target: the file to write; for a checkpoint in shards or in a folder, the folder or the index.
        changes: by name, a function from the old to the new tensor, of the same shape and dtype. One tensor is in
            memory at a time.
        added: tensors that ``source`` lacks, or has in another shape; they go to its first file, or replace the old.
        config: the ``config.json`` to put beside the weights, if they are written to a folder; default: that of
            ``source``, if it is a folder.

    Returns:
        The files that were written. Weights and index appear together; a crash in between leaves no index.

    Raises:
        ValueError: a file would replace one of ``source``, or would not be found beside what is there.
        OSError: a file cannot be written.
    """
    files, index, folder = _targets(source, target)
    beside = {} if folder is None else _beside(source, folder, config)
    targets = [*files.values(), *([] if index is None else [index])]
    require_no_overwrite([*targets, *beside], source.files)
    other = targets[-1].with_name(_SINGLE if targets[-1].name == _INDEX else _INDEX)
    if targets[-1].name in (_INDEX, _SINGLE) and other.exists():
        raise ValueError(f"{other} would be loaded in place of what is to be written beside it; remove it first")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for new in targets:
        new.parent.mkdir(parents=True, exist_ok=True)
    homes = {name: source._files.get(name, next(iter(source.shards))) for name in added}
    with replacing_all(targets) as unfinished:
        for old, path in zip(files, unfinished, strict=False):
            own = {name: tensor for name, tensor in added.items() if homes[name] == old}
            with source.open(old) as stream:
                if own:
                    _copied_with(stream, source.shards[old], path, changes, own)
                else:
                    _copied(stream, source.shards[old], path, changes)
        if index is not None:
            unfinished[-1].write_text(_index_text(source, {name: home.name for name, home in homes.items()}, added))
    for new, original in beside.items():
        if not (new.exists() and new.samefile(original)):
            with replacing_all([new]) as (path,):
                shutil.copyfile(original, path)
    return [*targets, *beside]


def _copied(stream: BinaryIO, header: Header, path: Path, changes: Mapping[str, Change]) -> None:
    with open(path, "r+b") as new:
        stream.seek(0)
        shutil.copyfileobj(stream, new, 2**24)
        for name in header.tensors.keys() & changes.keys():
            entry = header.tensors[name]
            tensor = raw(changes[name](read_tensor(stream, entry)))
            new.seek(entry.start)
            new.write(tensor)


def _copied_with(
    stream: BinaryIO, header: Header, path: Path, changes: Mapping[str, Change], added: Mapping[str, Tensor]
) -> None:
    entries = {name: (each.dtype, each.shape, each.end - each.start) for name, each in header.tensors.items()}
    entries |= {name: (name_of(tensor.dtype), tuple(tensor.shape), tensor.nbytes) for name, tensor in added.items()}
    with open(path, "wb") as new:
        for name in write_header(new, entries, header.metadata):
            if name in added:
                tensor = added[name]
            else:
                tensor = read_tensor(stream, header.tensors[name])
                tensor = changes[name](tensor) if name in changes else tensor
            new.write(raw(tensor))


def _index_text(source: Checkpoint, homes: Mapping[str, str], added: Mapping[str, Tensor]) -> str:
    if not added:
        return source.path.read_text()
    assert source.index is not None
    weight_map = {**source.index["weight_map"], **homes}
    sizes = {name: e.end - e.start for header in source.shards.values() for name, e in header.tensors.items()}
    sizes |= {name: tensor.nbytes for name, tensor in added.items()}
    metadata = {**source.index.get("metadata", {}), "total_size": sum(sizes.values())}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _targets(source: Checkpoint, target: Path) -> tuple[dict[Path, Path], Path | None, Path | None]:
    """The new file for each old one, the new index, and the folder that becomes a copy of the source's."""
    if source.index is None:
        is_folder = target.is_dir() or (source.folder is not None and target.suffix != ".safetensors")
        file = target / source.path.name if is_folder else target
        return {source.path: file}, None, target if is_folder else None
    index = target if target.suffix == ".json" else target / source.path.name
    return {file: index.with_name(file.name) for file in source.shards}, index, index.parent


def _beside(source: Checkpoint, folder: Path, config: Path | None) -> dict[Path, Path]:
    """The files that a model needs beside its weights, by what they become."""
    found = {
        folder / file.name: file
        for file in (() if source.folder is None else sorted(source.folder.iterdir()))
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS)
        and file.name not in _OF_TRAINING
    }  # fmt: skip
    if config is not None:
        found[folder / "config.json"] = config
    return found


def _index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
        files = set(index["weight_map"].values())
        if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise ValueError("weight_map must name files in the same folder")
        if not isinstance(index.get("metadata", {}), dict):
            raise ValueError("metadata must be an object")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error}") from None
    return dict(index)


def _named(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{file} is {error}") from None


def _identity(stream: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
