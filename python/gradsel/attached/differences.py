"""A quantised weight that is trained in part: its values are differences, because it cannot hold other entries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsel.attached.selected import Masked
from gradsel.masks import Mask


@dataclass(eq=False)
class Differences(Masked):
    """How a quantised weight is trained in part.

    Its values are a plain parameter of differences from the dequantised weight, which start at zero. They are added to
    the weight each time it is made dense; nothing is ever written to the weight.

    Attributes:
        entries: zeros that take no memory.
        product: how their gradient is computed.
        quantised: the fingerprint of the weight.
    """

    product: Any = field(kw_only=True)
    quantised: str = field(kw_only=True)

    def follow(self, device: torch.device) -> None:
        """Moves the mask to a device."""
        if self.entries.device != device:
            before, self.mask = self.mask, self.mask.to(device)
            shared = zip(before.tensors().values(), self.mask.tensors().values(), strict=True)
            self.product = self.product.to(device, list(shared))
            self.entries = no_differences(self.mask, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Differences:
        memo[id(self)] = made = Differences(
            self.name, self.entries, mask=self.mask, product=self.product, quantised=self.quantised
        )
        return made


def no_differences(mask: Mask, device: torch.device) -> Tensor:
    """Zeros for each selected entry that take no memory: what differences are before training."""
    return torch.zeros((), device=device).expand(mask.compact_shape)
