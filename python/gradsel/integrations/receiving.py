"""The server's side of :mod:`gradsel.integrations.patches`: updates are applied in their order, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gradsel.integrations.patches import Patch, Patches


class UpdateRefused(ValueError):
    """An update that does not follow the last one; nothing was written. A full one must follow."""


class Receiver:
    """Applies the updates of one trainer to one set of weights.

    Attributes:
        sequence: number of the last update, -1 before the first.
    """

    def __init__(self, write: Callable[[list[Patch]], None]) -> None:
        """
        Args:
            write: writes patches to the weights, for example :func:`write_patches` with the tensors of a model.
        """
        self._write = write
        self._run = ""
        self._state: str | None = None
        self.sequence = -1

    def receive(self, update: Patches | bytes) -> None:
        """Applies an update.

        Raises:
            UpdateRefused: it is damaged, or does not follow the last one; nothing was written.
        """
        if not isinstance(update, Patches):
            try:
                update = Patches.from_bytes(update)
            except ValueError as error:
                raise UpdateRefused(str(error)) from None
        if not update and not update.is_full and update.after == self._state:
            return
        if update.run == self._run and update.sequence <= self.sequence:
            raise UpdateRefused(f"update {update.sequence} came after update {self.sequence}")
        if not update.is_full and (update.run != self._run or update.before != self._state):
            raise UpdateRefused(
                f"update {update.sequence} does not follow {self._known()}: updates between the two are missing"
            )
        self._state = None  # if writing fails half-way, only a full update can follow
        self._write(list(update))
        self._run, self.sequence, self._state = update.run, update.sequence, update.after

    def _known(self) -> str:
        return f"update {self.sequence} of this server" if self.sequence >= 0 else "the base, which this server has"


def write_patches(tensors: Mapping[str, Tensor], patches: Iterable[Patch]) -> None:
    """Writes patches to tensors by name, in place.

    Raises:
        ValueError: a tensor is missing, or has another shape or dtype; nothing was written.
    """
    patches = list(patches)
    for patch in patches:
        tensor = tensors.get(patch.name)
        if tensor is None or tuple(tensor.shape) != tuple(patch.shape) or tensor.dtype is not patch.dtype:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{patch.name} is {found} here, {patch.dtype} {list(patch.shape)} in the update")
    with torch.no_grad():
        for patch in patches:
            tensor = tensors[patch.name].detach()
            values = patch.values.to(tensor.device)
            if patch.indices is None:
                tensor.copy_(values.view(tensor.shape))
            else:
                places = torch.unravel_index(patch.indices.to(tensor.device).long(), tensor.shape)
                tensor.index_put_(places, values)
