"""Several identical passes over the same data: random numbers are reset, batches and losses compared."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from gradsel.ranking.preserving import Buffers, RandomState


class Replay:
    """Makes several passes over the data identical, and reports where they are not."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], passes: int) -> None:
        self._several = passes > 1
        self._model, self._batches = model, batches
        self._start: tuple[RandomState, Buffers] | None = None
        self._first: list[tuple[int, float, float]] = []  # digest of the batch, loss, its tolerance
        self._pass = self._batch = 0

    def rewind(self) -> None:
        """Begins a pass, with the random numbers and buffers of the first one."""
        self._pass, self._batch = self._pass + 1, 0
        if not self._several:
            return
        if self._start is None:
            self._start = (RandomState(self._model, self._batches), Buffers(self._model))
        else:
            for part in self._start:
                part.restore()

    def check(self, batch: Any, value: Tensor) -> None:
        """Compares a batch and its loss with those of the first pass."""
        if not self._several:
            return
        seen = (_digest(batch), value.item(), torch.finfo(value.dtype).eps ** 0.75)
        if self._pass == 1:
            self._first.append(seen)
        elif self._batch >= len(self._first):
            self._refuse(f"has more than the {len(self._first)} batches of the first")
        elif self._first[self._batch][0] != seen[0]:
            self._refuse(f"saw other data in batch {self._batch + 1}")
        elif abs(self._first[self._batch][1] - seen[1]) > seen[2] * abs(seen[1]) + 1e-8:
            self._refuse(
                f"has loss {seen[1]:g} in batch {self._batch + 1}, the first had {self._first[self._batch][1]:g}"
            )
        self._batch += 1

    def ended(self) -> None:
        """Ends a pass."""
        if self._several and self._batch < len(self._first):
            self._refuse(f"has only {self._batch} batches, the first had {len(self._first)}")

    def _refuse(self, what: str) -> None:
        hint = "use only these for random numbers, pass a list of batches, or use memory='full'"
        if getattr(self._batches, "persistent_workers", False):
            hint = "persistent workers keep their own generators: use persistent_workers=False"
        raise ValueError(
            f"passes over the data must be alike, but pass {self._pass} {what}. The global random number generators "
            f"and those of a DataLoader are reset for each pass; {hint}"
        )


def _digest(value: Any) -> int:
    """A checksum of the tensors, arrays and plain values in a batch; 0 for values of other types."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return 0
        memory = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(memory.data, zlib.crc32(repr((value.dtype, tuple(value.shape))).encode()))
    if isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        return zlib.crc32(value.tobytes(), zlib.crc32(repr((value.dtype, value.shape)).encode()))
    if isinstance(value, Mapping):
        return _joined([part for item in value.items() for part in item])
    if isinstance(value, (list, tuple)):
        return _joined(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _joined([getattr(value, field.name, None) for field in dataclasses.fields(value)])
    known = isinstance(value, (str, bytes, int, float, complex, bool, numpy.generic, type(None)))
    return zlib.crc32(repr(value).encode()) if known else 0


def _joined(parts: Sequence[Any]) -> int:
    return zlib.crc32(repr([_digest(part) for part in parts]).encode())
