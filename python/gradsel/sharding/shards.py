"""What this rank holds of a weight that is trained in part and sharded, and of its values."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsel.dtypes import adopted, differs
from gradsel.masks import Mask
from gradsel.sharding.parallel import Part
from gradsel.sharding.reducing import Reduction
from gradsel.sharding.shares import Share, entries_of, is_aligned, share_of
from gradsel.sharding.tensors import is_sharded, local_of, part_like, sum_over_shards, whole_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Shards:
    """A weight and its values between forwards, when FSDP has not gathered them.

    The optimizer holds ``values``. Where a rank's shard of them holds the values of its own shard of the weight, which
    is so for masks by rows of a weight that is sharded by rows, nothing is sent to bring the weight up to date.
    Otherwise all values are gathered first.

    Attributes:
        mask: of the whole weight.
        weight: a DTensor; None until FSDP has put it in its place.
        values: a DTensor, or a plain parameter that all ranks hold alike; None likewise.
        gathered: by "weight" and "values", the parameter that FSDP gathers for a forward, once it is known; None for
            values that FSDP does not know.
        seen: the state in which weight and values last agreed; None: not known.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.weight: Tensor | None = None
        self.values: Tensor | None = None
        self.gathered: dict[str, Tensor | None] = {}
        self.seen: list[int] | None = None
        self._part: Part | None = None
        self._reduction: Reduction | None = None

    def put(self, weight: Tensor | None = None, values: Tensor | None = None) -> None:
        """Takes over a parameter that has been put into the place of the weight, or of the values."""
        self.weight = self.weight if weight is None else weight
        self.values = self.values if values is None else values
        for computed in ("share", "aligned"):
            vars(self).pop(computed, None)
        self._reduction = None

    def part_of(self, weight: Tensor) -> Part:
        """How gradients of a weight that is a DTensor in forward, too, become those of values.

        Args:
            weight: as the forward sees it.
        """
        if self._part is None or not self._part.is_of(weight):
            self._part = Part(self.mask, weight)
        return self._part

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Weight and values."""
        assert self.weight is not None
        assert self.values is not None
        return self.weight, self.values

    @property
    def are_known_to_fsdp(self) -> bool:
        """Whether the values are among what FSDP shards and gathers, if it does so with the weight."""
        return is_sharded(self.both[1]) and self.gathered.get("values", self) is not None

    @cached_property
    def share(self) -> Share:
        """The selected entries in this rank's shard of the weight."""
        weight, _ = self.both
        return share_of(self.mask, weight)

    @cached_property
    def aligned(self) -> bool:
        """Whether every rank holds the values of its own shard."""
        return is_aligned(self.mask, *self.both)

    def everywhere(self) -> Tensor:
        """All values. A collective call."""
        return whole_of(self.both[1])

    def here(self) -> Tensor:
        """The values of this rank's shard of the weight. A collective call unless they are aligned."""
        _, values = self.both
        return local_of(values).detach() if self.aligned else self.share.of(whole_of(values))

    def in_forward(self, values: Tensor, alike: DeviceMesh | None = None) -> Tensor:
        """What a forward differentiates by: the values that FSDP has gathered, or a stand-in for those it has not.

        Args:
            alike: see :class:`gradsel.sharding.reducing.Reduction`.
        """
        return self.reduction(alike).stand_in(values) if values is self.values else values

    def reduction(self, alike: DeviceMesh | None = None) -> Reduction:
        """How the gradient of values that FSDP does not know is averaged."""
        if self._reduction is None or self._reduction.alike != alike:
            weight, values = self.both
            self._reduction = Reduction(values, weight, alike)
        return self._reduction

    @torch.no_grad()
    def write(self) -> None:
        """Writes the values to the weight."""
        weight, _ = self.both
        self.share.mask.scatter_(local_of(weight), self.here())
        self.mark()

    @torch.no_grad()
    def agree(self) -> bool:
        """Whether all shards of the weight hold its values, as after loading a checkpoint. A collective call."""
        weight, _ = self.both
        entries = self.share.mask.gather(local_of(weight))
        wrong = differs(entries, self.here().to(entries.dtype))
        if int(sum_over_shards(wrong.sum(), weight)):
            return False
        self.mark()
        return True

    @property
    def agreed(self) -> bool:
        """Whether nobody has written weight or values since they last agreed."""
        return self.weight is not None and self.values is not None and self.seen == self._state()

    def mark(self) -> None:
        """Weight and values agree now."""
        self.seen = self._state()

    @torch.no_grad()
    def refresh(self) -> bool:
        """Makes both agree if either has changed, as :meth:`gradsel.attached.Selected.refresh` does.

        Every rank has to have changed the same of them; the ranks then communicate alike.

        Returns:
            Whether anything has changed.
        """
        now, seen = self._state(), self.seen
        if now == seen:
            return False
        weight, values = self.both
        half = len(now) // 2
        values_changed, weight_changed = (seen is None or now[part] != seen[part] for part in _halves(half))
        if not weight_changed:
            self.write()
            return True
        if self.aligned:
            entries, own = self.share.mask.gather(local_of(weight)), local_of(values).detach()
        else:
            entries, own = entries_of(self.mask, weight, self.share), whole_of(values)
        if values_changed:
            self.share.mask.scatter_(local_of(weight), own if self.aligned else self.share.of(own))
        else:
            taken = adopted(own, entries)
            local_of(values).copy_(taken if self.aligned else part_like(taken, values))
        self.mark()
        return True

    def _state(self) -> list[int]:
        """What changes when anybody writes values, and then what does when anybody writes the weight.

        DTensors and what they hold of this rank have version counters of their own.
        """
        weight, values = self.both
        return [number for t in (values, weight) for number in (id(t), _version(t), *_memory(local_of(t)))]


def _halves(half: int) -> tuple[slice, slice]:
    return slice(None, half), slice(half, None)


def _memory(tensor: Tensor) -> tuple[int, int]:
    return _version(tensor), tensor.data_ptr()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
