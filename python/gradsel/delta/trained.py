"""What an attached model trains, as deltas see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import attachments_of, require_complete
from gradsel.delta.parts import Part, digest_with
from gradsel.masks import Mask, Whole
from gradsel.parameters.fingerprints import fingerprint


@dataclass
class Trained:
    """One trained parameter of an attached model.

    Attributes:
        mask: its trained entries.
        values: the values of these entries: a parameter of their own, or ``tensor`` itself.
        originals: the same entries at attach().
        tensor: the parameter.
    """

    mask: Mask
    values: Tensor
    originals: Tensor
    tensor: Tensor

    def whole_before(self) -> Tensor:
        """The whole parameter as it was at attach()."""
        original = self.tensor.detach().clone()
        self.mask.scatter_(original, self.originals)
        return original

    def fingerprint_before(self) -> str:
        """The fingerprint of the whole parameter as it was at attach()."""
        return fingerprint(self.whole_before())

    def digest_before(self, part: Part) -> str:
        """The digest of the entries and probes of a part as they were at attach()."""
        return digest_with(self.originals, self.tensor, part)


def trained_in(root: nn.Module) -> dict[str, Trained]:
    """What an attached model trains, by the names at attach(), in the order of its parameters.

    Raises:
        ValueError: a trained parameter is no longer part of the model.
    """
    require_complete(root, "a delta of this model would lack what it has trained")
    found: dict[str, Trained] = {}
    places: dict[str, int] = {}
    order = {id(parameter): number for number, parameter in enumerate(root.parameters())}
    with torch._C.DisableTorchFunctionSubclass():
        for module in root.modules():
            attachments = attachments_of(module)
            if attachments is None:
                continue
            for selected in attachments.partial.values():
                weight, values = selected.weight(), selected.values()
                assert weight is not None
                assert values is not None
                selected.refresh(weight)
                places[selected.name] = order[id(weight)]
                found[selected.name] = Trained(selected.mask, values.detach(), selected.entries, weight.detach())
            for short, original in attachments.whole.items():
                whole: Any = module._parameters[short]
                places[original.name] = order[id(whole)]
                found[original.name] = Trained(Whole(whole.shape), whole, original.entries, whole)
    return {name: found[name] for name in sorted(found, key=places.__getitem__)}
