"""What an attached model trains, as deltas see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradsel.attached import RECORD, SUFFIX, selected_in
from gradsel.delta.parts import Part, digest_with
from gradsel.masks import Mask, Whole
from gradsel.parameters.fingerprints import fingerprint
from gradsel.parameters.names import named_parameters


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


def attached_root(model: nn.Module) -> nn.Module | None:
    """The module that attach() was called on: the model or one inside it; None if there is none.

    Raises:
        ValueError: there are several.
    """
    roots = [module for module in model.modules() if RECORD in vars(module)]
    if len(roots) > 1:
        raise ValueError(f"{len(roots)} modules of the model are attached, each on its own; pass one of them")
    return roots[0] if roots else None


def trained_in(root: nn.Module) -> dict[str, Trained]:
    """What an attached model trains, by name, in the order of its parameters."""
    found: dict[str, Trained] = {}
    for module in root.modules():
        for short, selected in selected_in(module).items():
            own: Any = module._parameters
            found[selected.name] = Trained(selected.mask, own[short + SUFFIX], selected.original, own[short])
    parameters = named_parameters(root)
    for name, original in vars(root)[RECORD].wholes.items():
        found[name] = Trained(Whole(original.shape), parameters[name], original, parameters[name])
    return {name: found[name] for name in parameters if name in found}
