"""What ``gradsel delta`` does with checkpoints: applies deltas to them, reverts these, and makes deltas of two."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gradsel.cli.running import say
from gradsel.delta.checkpoints import Checkpoint, require_no_overwrite, rewrite
from gradsel.delta.delta import Delta
from gradsel.delta.fitting import Destination, fitted, in_checkpoint, named_alike, require_head_of
from gradsel.delta.making import differing, whole
from gradsel.delta.parts import Part, bits_of, entries_of, read, same_bits, write_
from gradsel.delta.sites import Site, is_base, originals_in, require_base, sites_of
from gradsel.files import require_folder
from gradsel.parameters.fingerprints import fingerprint
from gradsel.tables import shape_text

#: The largest fraction of entries that may differ for a delta to be worth making.
MOST_DIFFERING = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def apply(arguments: argparse.Namespace) -> None:
    require_no_overwrite([arguments.out], [arguments.delta])

    def change(name: str, part: Part, tensor: Tensor, force: bool) -> Tensor:
        site = _site(name, part, tensor, force)
        originals_in([site], force)
        write_(tensor, part, site.values)
        return tensor

    source = Checkpoint(arguments.base)
    delta = Delta.load(arguments.delta, force=arguments.force)
    there = in_checkpoint(source, folders_of(arguments, source))
    _change(delta, there, source, arguments, change)


def revert(arguments: argparse.Namespace) -> None:
    require_no_overwrite([arguments.out], [arguments.delta])
    delta = Delta.load(arguments.delta, force=True)
    if lost := [name for name, part in delta.items() if part.originals is None]:
        raise ValueError(
            f"{arguments.delta} does not have the original entries of {len(lost)} tensors, first {lost[0]}: only "
            "deltas saved with them (--with-originals, save(originals=True)) can be reverted without the base"
        )

    def change(name: str, part: Part, tensor: Tensor, force: bool) -> Tensor:
        site = _site(name, part, tensor, force)
        tuned = same_bits(entries_of(tensor, part), site.values)
        assert part.originals is not None
        write_(tensor, part, part.originals.reshape(-1).to(tensor.dtype))
        if not force:
            found = tuned and is_base(name, part, read(tensor, part)[1], lambda: fingerprint(tensor))
            require_base([] if found else [name], len(delta))
        return tensor

    source = Checkpoint(arguments.tuned)
    there = in_checkpoint(source, folders_of(arguments, source), is_tuned=True)
    _change(delta, there, source, arguments, change)


def _site(name: str, part: Part, tensor: Tensor, force: bool) -> Site:
    return sites_of({name: part}, {name: tensor}, force)[0]


def folders_of(arguments: argparse.Namespace, source: Checkpoint) -> list[Path]:
    """Where the config.json of the model may be."""
    return [source.path.parent, arguments.delta.parent] if arguments.model is None else [arguments.model]


def _change(
    delta: Delta,
    there: Destination,
    source: Checkpoint,
    arguments: argparse.Namespace,
    change: Callable[[str, Part, Tensor, bool], Tensor],
) -> None:
    """Rewrites the tensors that the delta touches, after checking that all of them fit."""
    heads = _heads(delta, there, source)
    if len(heads) == len(delta) and not arguments.force:
        folders = [arguments.model] if arguments.model is not None else [arguments.delta.parent, source.path.parent]
        require_head_of(heads, source, in_checkpoint(source, folders))

    def attempt(parts: Mapping[str, Part], force: bool) -> Mapping[str, Part]:
        for name in parts:
            if name not in source:
                raise ValueError(f"{source.path} has no {name!r}, which the delta sets; it was made for another model")
        for name, part in parts.items():
            change(name, part, source[name], force)
        return parts

    rest = {name: part for name, part in delta.items() if name not in heads}
    parts = fitted(rest, there, arguments.force, attempt) if rest else rest

    def changed(name: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: change(name, parts[name], tensor, arguments.force)

    config = _config(arguments, source, bool(heads), parts is not rest)
    added = {name: part.values.to(part.dtype) for name, part in heads.items()}
    for file in rewrite(source, arguments.out, {name: changed(name) for name in parts}, added, config):
        say(file)
    for name, part in heads.items():
        say(f"{name} is the task's, {shape_text(part.mask.shape)}; BASE has {_size(source, name)}")
    if heads and config is None:
        say("If a config.json says how many classes the model has, it must say the task's number")


def _heads(delta: Delta, there: Destination, source: Checkpoint) -> dict[str, Part]:
    """The tensors that the task has for itself: set whole, and missing in the base or of another size there."""
    wholes = {name: part for name, part in delta.items() if part.mask.is_whole}
    missing = [name for name in wholes if name not in source]
    names = there.names(delta) if missing and there.into == "checkpoint" else None
    found = {name: wholes[name] for name in missing if names is None or names.group(name, "checkpoint") is None}
    for name, part in wholes.items():
        if name in source and _is_resized(part.mask.shape, source.shapes[name]):
            found[name] = part
    return found


def _is_resized(ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether only the first dimension, the number of classes, differs."""
    return ours != theirs and len(ours) == len(theirs) > 0 and ours[1:] == theirs[1:]


def _size(source: Checkpoint, name: str) -> str:
    return shape_text(source.shapes[name]) if name in source else "none"


def _config(arguments: argparse.Namespace, source: Checkpoint, has_heads: bool, is_translated: bool) -> Path | None:
    """The config.json that belongs beside the new weights, if it is not just that of the old ones."""
    if arguments.model is not None:
        folders = [arguments.model]
    elif has_heads:
        folders = [arguments.delta.parent]
    elif is_translated and (source.folder is None or not (source.folder / "config.json").exists()):
        folders = folders_of(arguments, source)
    else:
        return None
    return next((file for file in (folder / "config.json" for folder in folders) if file.exists()), None)


# --- Deltas made -------------------------------------------------------------------------------------------------


def make(arguments: argparse.Namespace) -> None:
    require_folder(arguments.out)
    base, checkpoint = Checkpoint(arguments.base), Checkpoint(arguments.tuned)
    require_no_overwrite([arguments.out], [*base.files, *checkpoint.files])
    checkpoint = checkpoint.without_values(base)
    tuned = named_alike(checkpoint, base)
    heads = [name for name in tuned if name not in base or _is_resized(tuned[name].shape, base.shapes[name])]
    _require_few(base, tuned, heads)
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    found = {}
    for name in tuned:
        part = whole(name, tuned[name], dtype) if name in heads else differing(name, base[name], tuned[name], dtype)
        if part is not None:
            found[name] = part
    notes = {"policy": "entries that differ", "base": arguments.base.name, "tuned": arguments.tuned.name}
    delta = Delta(found, notes)
    delta.save(arguments.out, originals=arguments.with_originals, force=arguments.force)
    say(f"{delta!r}\n{arguments.out}: {arguments.out.stat().st_size:,} bytes; the checkpoint has {checkpoint.nbytes:,}")
    if heads:
        say(f"{len(heads)} tensors are not in BASE, or of another size there, first {heads[0]}: they are set whole")
    if lost := [name for name in base if name not in tuned]:
        say(f"{len(lost)} tensors of BASE are not in TUNED, first {lost[0]}: the delta leaves them as they are")


def _require_few(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], heads: list[str]) -> None:
    if len(heads) == len(tuned):
        raise ValueError(
            f"the base has none of the {len(tuned)} tensors of the tuned checkpoint by the same name and in the same "
            "shape; if they only have other names, put the config.json of their model beside each of the two"
        )
    count, total, worst = 0, 0, ("", 0.0)
    for name in tuned:
        ours, theirs = tuned[name], None if name in heads else base[name]
        if theirs is not None and (ours.shape != theirs.shape or ours.dtype is not theirs.dtype):
            continue  # differing() reports it
        moved = ours.numel() if theirs is None else int((bits_of(ours) != bits_of(theirs)).sum())
        count, total = count + moved, total + ours.numel()
        worst = max(worst, (name, moved / max(ours.numel(), 1)), key=lambda pair: pair[1])
    if count > MOST_DIFFERING * total:
        raise ValueError(
            f"{count:,} of {total:,} entries differ "
            f"({100 * count / total:.1f} %; {100 * worst[1]:.1f} % of {worst[0]}): "
            "this is not sparse fine-tuning, and a delta would be about as large as the checkpoint"
        )
