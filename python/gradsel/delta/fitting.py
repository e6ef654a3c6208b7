"""Fitting a delta to a model or a checkpoint: as it is or, if that fails, by the names that tensors have there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from gradsel.delta.checkpoints import Checkpoint
from gradsel.delta.parts import Part, tensors_of, write_
from gradsel.delta.sites import FORCE
from gradsel.delta.translating import tensors_there, translated
from gradsel.parameters import checkpoint_names
from gradsel.parameters.checkpoint_names import CheckpointNames, Group
from gradsel.parameters.names import named_parameters

Parts = Mapping[str, Part]
Result = TypeVar("Result")


@dataclass
class Destination:
    """Where a delta is wanted: in a model, or in a checkpoint.

    Attributes:
        into: whose names it should have there.
        names: looks up which names stand for which; None if there are no others.
        base: a tensor of the base there, by name.
        is_tuned: whether these tensors have the delta in them; they are the base once its originals are put back.
    """

    into: Literal["model", "checkpoint"]
    names: Callable[[Parts], CheckpointNames | None]
    base: Callable[[str], Tensor]
    is_tuned: bool = False

    def tensors(self, parts: Parts, group: Group) -> dict[str, Tensor]:
        """The tensors of the base there that are in a group."""
        found = {}
        for name in tensors_there(group, self.into):
            tensor = self.base(name)
            if self.is_tuned and name in parts:
                part = parts[name]
                assert part.originals is not None
                tensor = tensor.detach().clone()
                write_(tensor, part, part.originals.reshape(-1).to(tensor.dtype))
            found[name] = tensor
        return found


def in_model(model: nn.Module, before: Mapping[str, Callable[[], Tensor]] | None = None) -> Destination:
    """A model, attached or not, as the destination of a delta.

    Args:
        before: by name, how to make the tensors of the base that the model has changed.
    """
    known = before or {}

    def names(parts: Parts) -> CheckpointNames | None:
        return checkpoint_names.of_model(model, {name: part.mask.shape for name, part in parts.items()})

    def base(name: str) -> Tensor:
        return known[name]() if name in known else tensors_of(model)[name]

    return Destination("model", names, base)


def in_checkpoint(source: Checkpoint, folders: Iterable[Path], *, is_tuned: bool = False) -> Destination:
    """A checkpoint as the destination of a delta.

    Args:
        folders: where to look for the ``config.json`` that says which model it is of.
    """

    def names(parts: Parts) -> CheckpointNames | None:
        found = (checkpoint_names.of_folder(folder, source.shapes) for folder in folders)
        return next((each for each in found if each is not None), None)

    return Destination("checkpoint", names, source.__getitem__, is_tuned)


def fitted(parts: Parts, there: Destination, force: bool, attempt: Callable[[Parts, bool], Result]) -> Result:
    """The result of ``attempt`` with the parts as they are or, if it refuses these, translated.

    Args:
        attempt: called with parts and with ``force``; raises ValueError if the parts do not fit.

    Raises:
        ValueError: that of ``attempt``. Or both the parts as they are and the translated ones could be meant, and the
            base shows neither.
    """
    try:
        result = attempt(parts, force)
    except ValueError as error:
        refused: ValueError | None = error
    else:
        refused = None
        if not force:
            return result
    try:
        names = there.names(parts)
        moved = {} if names is None else _moved(parts, names, there.into)
    except ValueError as error:
        if refused is None:
            return result
        raise ValueError(f"{refused}; {error}") from None
    if names is None or not moved:
        if refused is None:
            return result
        raise refused
    if refused is not None and any(_is_missing(name, there, names) for name in parts):
        return _translated_attempt(parts, names, there, force, attempt)
    return _either(parts, names, there, attempt, refused)


def require_head_of(heads: Parts, source: Checkpoint, there: Destination) -> None:
    """Checks that a delta that only has a head is for the model that a checkpoint is of.

    The entries of a checkpoint say nothing about that, because nothing in it is set in part.

    Raises:
        ValueError: it is for another model, or that is not known.
    """
    names = there.names(heads)
    told = (
        f"all {len(heads)} tensors of the delta, first {next(iter(heads))}, are missing in {source.path}, or have "
        "another shape there. If they are a head, nothing in that checkpoint can show that it is the head's base: "
    )
    if names is None:
        raise ValueError(
            f"{told}put the config.json of the task's model beside the delta, or pass --model FOLDER with it, so that "
            "the model's other tensors are looked up in BASE; or put them there as they are with force=True"
        )
    if lacking := names.lacking({name: part.mask.shape for name, part in heads.items()}):
        raise ValueError(
            f"{told}and by the config.json, it is not, as {lacking}. Pass --model FOLDER with the config.json of the "
            "task's model, or put them there as they are with force=True"
        )


def by_names_in(model: nn.Module, parts: Parts) -> Parts:
    """The parts by the names in a model, without a check of the base."""
    tensors = tensors_of(model)
    if all(name in tensors for name in parts):
        return parts
    names = in_model(model).names(parts)
    return parts if names is None else translated(parts, names, "model")


def tensors_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by the names and in the layout of a model; as they are if these are its own names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if all(name in tensors for name in named_parameters(model)):
        return tensors
    names = checkpoint_names.of_model(model, shapes)
    if names is None or any(names.group(name, "model") is None for name in tensors):
        return tensors
    found: dict[str, Tensor] = {}
    for group in {id(group): group for name in tensors if (group := names.group(name, "model")) is not None}.values():
        if any(shapes.get(name) != shape for name, shape in group.checkpoint.items()):
            continue
        flat = torch.cat([tensors[name].detach().reshape(-1) for name in group.checkpoint])
        flat = flat if group.is_renaming else flat[group.origins().to(flat.device)]
        pieces = flat.split([math.prod(shape) for shape in group.model.values()])
        found |= {name: piece.view(group.model[name]) for name, piece in zip(group.model, pieces, strict=True)}
    return found


def other_names(model: nn.Module, parts: Parts) -> dict[str, tuple[str, ...]]:
    """For a delta with the names of a model: those in its checkpoints, where they differ; and the other way around."""
    tensors = tensors_of(model)
    if not all(name in tensors for name in parts):
        names = in_model(model).names(parts)
        return {} if names is None else _moved(parts, names, "model")
    names = checkpoint_names.of_model(model, {})
    return {} if names is None else _moved(parts, names, "checkpoint")


def named_alike(tuned: Checkpoint, base: Checkpoint) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by the names that another one of the same model has for them.

    Raises:
        ValueError: a tensor is not only called differently there, but merged, split or permuted.
    """
    if tuned.keys() == base.keys():
        return tuned
    ours, theirs = (checkpoint_names.of_folder(each.path.parent, each.shapes) for each in (tuned, base))
    if ours is None or theirs is None:
        return tuned
    found = {}
    for name in tuned:
        first = ours.group(name, "model")
        second = None if first is None else theirs.group(next(iter(first.model)), "checkpoint")
        new = name if second is None else next(iter(second.checkpoint))
        if first is not None and second is not None and not (first.is_renaming and second.is_renaming):
            if name in base:
                new = name
            else:
                raise ValueError(
                    f"{name} of the tuned checkpoint has another layout in the base: {first}, {second}; save both with "
                    "save_pretrained(save_original_format=True), or both without"
                )
        found[new] = name
    return Renamed(tuned, found)


class Renamed(Mapping[str, Tensor]):
    """The tensors of a checkpoint by other names, each read on access.

    Args:
        names: those in the checkpoint, by the other names.
    """

    def __init__(self, source: Checkpoint, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_missing(name: str, there: Destination, names: CheckpointNames) -> bool:
    return name not in (names.model if there.into == "model" else names.checkpoint)


def _translated_attempt(
    parts: Parts, names: CheckpointNames, there: Destination, force: bool, attempt: Callable[[Parts, bool], Result]
) -> Result:
    given = _moved(parts, names, there.into)
    try:
        return attempt(translated(parts, names, there.into, there.tensors, force), force)
    except ValueError as error:
        raise ValueError(_explained(str(error), given)) from None


def _either(
    parts: Parts,
    names: CheckpointNames,
    there: Destination,
    attempt: Callable[[Parts, bool], Result],
    refused: ValueError | None,
) -> Result:
    """For names that both the model and the checkpoint have, for different tensors: whichever has the right base."""
    if refused is None:
        try:
            return attempt(parts, False)
        except ValueError as error:
            refused = error
    try:
        return _translated_attempt(parts, names, there, False, attempt)
    except ValueError:
        old, new = next(iter(_moved(parts, names, there.into).items()))
        raise ValueError(
            f"{str(refused).removesuffix(f'; {FORCE}')}. {old} in the delta may also stand for {', '.join(new)} here, "
            "and as the base shows neither, force=True does not help"
        ) from None


def _moved(parts: Parts, names: CheckpointNames, into: Literal["model", "checkpoint"]) -> dict[str, tuple[str, ...]]:
    """The new names of the tensors that have others there, or another layout."""
    found = {}
    for name in parts:
        group = names.group(name, into)
        if group is not None and not group.leaves(name):
            found[name] = tuple(tensors_there(group, into))
    return found


def _explained(message: str, moved: Mapping[str, tuple[str, ...]]) -> str:
    """A message about tensors by their new names, with those that they have in the delta."""
    olds: dict[str, list[str]] = {}
    for old, new in moved.items():
        for name in new:
            olds.setdefault(name, []).append(old)
    known = [
        f"{new} is {', '.join(old[:2])}{' and more' if len(old) > 2 else ''} in the delta"
        for new, old in olds.items()
        if re.search(rf"(?<![\w.]){re.escape(new)}(?![\w.]*\w)", message) and old != [new]
    ]
    return message + (f" ({'; '.join(known[:3])})" if known else "")
