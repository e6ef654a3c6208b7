"""Deltas and quantised weights: parts that hold differences, in models where the weight stays quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsel.attached import Differences, differences_in
from gradsel.delta.parts import Part
from gradsel.delta.sites import FORCE, require_base
from gradsel.masks import same
from gradsel.parameters.names import parameter_uses, quantised_in
from gradsel.quantised import Fixed, Quantised, install, installed, require_known, uninstall
from gradsel.sharding import whole_of
from gradsel.tables import shape_text


@dataclass
class Place:
    """A quantised weight of a model, and the layers that use it."""

    name: str
    weight: Quantised
    modules: list[nn.Module]


def places_in(model: nn.Module) -> dict[str, Place]:
    """The quantised weights of a model that can take differences, by name."""
    uses = parameter_uses(model)
    return {
        name: Place(name, weight, [module for _, module, _ in uses[name]])
        for name, weight in quantised_in(uses).items()
    }


def split(parts: Mapping[str, Part], model: nn.Module) -> tuple[dict[str, Part], list[tuple[Place, Part]]]:
    """The parts that are written to tensors, and those that are added to quantised weights.

    Raises:
        ValueError: a part sets values of a quantised weight, or is for one of another shape.
    """
    places = places_in(model)
    rest = {name: part for name, part in parts.items() if name not in places}
    added = [(places[name], part) for name, part in parts.items() if name in places]
    for place, part in added:
        if not part.differences:
            raise ValueError(
                f"{place.name} is quantised ({place.weight.kind}) in the model, and the delta sets values of it, as it "
                "was trained on a dense one: apply it to that base, or train on the quantised model"
            )
        if part.mask.shape != place.weight.shape:
            raise ValueError(
                f"{place.name} is {shape_text(part.mask.shape)} in the delta, {shape_text(place.weight.shape)} in the "
                "model; it was made for another model"
            )
    return rest, added


def require_quantised_base(added: list[tuple[Place, Part]]) -> None:
    """Checks by fingerprint that quantised weights are those that the differences were trained on.

    Raises:
        ValueError: some are not, or the delta does not know.
    """
    for place, part in added:
        if not part.fingerprint:
            raise ValueError(f"the delta does not know the base of {place.name}, as it was made without it; {FORCE}")
    require_base([place.name for place, part in added if part.fingerprint != place.weight.fingerprint()], len(added))


def put_on(added: list[tuple[Place, Part]]) -> list[tuple[nn.Module, Fixed]]:
    """Makes layers add the differences.

    Raises:
        ValueError: another delta is there already; nothing has changed.
    """
    for place, _ in added:
        if any(installed(module) is not None for module in place.modules):
            raise ValueError(f"another delta has been applied to the quantised {place.name}; revert that first")
    made = []
    for place, part in added:
        device = place.weight.device
        mask, values = part.mask.to(device), part.values.to(device)
        for module in place.modules:
            forward = Fixed(module, place.name, mask, values)
            install(module, forward)
            made.append((module, forward))
    return made


def take_off(made: list[tuple[nn.Module, Fixed]]) -> None:
    """Undoes :func:`put_on`."""
    for module, forward in made:
        if installed(module) is forward:
            uninstall(module)


def require_on(made: list[tuple[nn.Module, Fixed]]) -> None:
    """
    Raises:
        RuntimeError: layers no longer add the differences that :func:`put_on` made them add.
    """
    for module, forward in made:
        if installed(module) is not forward:
            raise RuntimeError(f"the differences of {forward.name} have been taken away since the delta was applied")


# --- Attached models ---------------------------------------------------------------------------------------------


def differences_of(root: nn.Module) -> dict[str, Differences]:
    """The quantised weights that an attached model trains in part, by the names at attach()."""
    return {each.name: each for module in root.modules() for each in differences_in(module).values()}


def part_of(differences: Differences, dtype: torch.dtype | None) -> Part:
    """The part of a delta with what was trained.

    Args:
        dtype: round differences to this dtype.
    """
    values = differences.values()
    assert values is not None
    module, _ = differences.alive()[0]
    weight = require_known(module, differences.name)
    copied: Tensor = whole_of(values).to("cpu", dtype or values.dtype, copy=True).contiguous()
    return Part(
        differences.mask.to(torch.device("cpu")),
        copied,
        weight.dtype,
        fingerprint=differences.quantised,
        differences=weight.kind,
    )


def require_fits(trained: Mapping[str, Differences], parts: Mapping[str, Part], force: bool) -> None:
    """Checks that parts hold the differences that an attached model trains.

    Raises:
        ValueError: they are for other entries, hold values, or without force were trained on another base.
    """
    for name, differences in trained.items():
        if name not in parts or not same(differences.mask, parts[name].mask):
            raise ValueError(
                f"the model is attached to a selection of other entries than the delta's, first of {name}: "
                "gradsel.detach(model, restore=True), then attach it to delta.selection(model)"
            )
        if not parts[name].differences:
            raise ValueError(f"{name} is quantised in the model, and the delta sets values of it, not differences")
    if not force:
        wrong = [name for name, each in trained.items() if parts[name].fingerprint != each.quantised]
        require_base(wrong, len(parts))
