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
from gradsel.sharding import is_sharded, local_of, reshard, share_of, whole_of


@dataclass
class Trained:
    """One trained parameter of an attached model.

    Attributes:
        mask: its trained entries.
        values: the values of these entries: a parameter of their own, or ``tensor`` itself.
        originals: the same entries at attach().
        tensor: the parameter; a DTensor if the model is sharded.
    """

    mask: Mask
    values: Tensor
    originals: Tensor
    tensor: Tensor

    def whole_before(self) -> Tensor:
        """The whole parameter as it was at attach()."""
        original = self.tensor.detach().clone()
        if is_sharded(original):
            share = share_of(self.mask, original)
            share.mask.scatter_(local_of(original), share.of(self.originals))
        else:
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

    Of a sharded model what is trained is gathered, and all ranks call it.

    Raises:
        ValueError: a trained parameter is no longer part of the model.
    """
    require_complete(root, "a delta of this model would lack what it has trained")
    reshard(root)
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
                places[selected.name] = order[id(weight)]
                if selected.shards is not None:
                    selected.shards.refresh()
                    mask, values = selected.mask.to(weight.device), selected.shards.everywhere()
                    found[selected.name] = Trained(mask, values, whole_of(selected.entries), weight.detach())
                    continue
                selected.refresh(weight)
                found[selected.name] = Trained(selected.mask, values.detach(), selected.entries, weight.detach())
            for short, original in attachments.whole.items():
                whole: Any = module._parameters[short]
                places[original.name] = order[id(whole)]
                entries = whole_of(original.entries)
                found[original.name] = Trained(Whole(whole.shape), whole_of(whole), entries, whole.detach())
    return {name: found[name] for name in sorted(found, key=places.__getitem__)}
