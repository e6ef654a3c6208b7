"""``gradsel delta``: deltas of safetensors checkpoints, tensor by tensor, without the model's code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from gradsel.delta.adapter_files import originals_of
from gradsel.delta.checkpoints import Checkpoint, require_no_overwrite, rewrite
from gradsel.delta.delta import Delta
from gradsel.delta.fitting import (
    Destination,
    by_names_in,
    fitted,
    in_checkpoint,
    named_alike,
    other_names,
    require_head_of,
)
from gradsel.delta.lora import Above
from gradsel.delta.making import differing, whole
from gradsel.delta.parts import Part, bits_of, entries_of, read, same_bits, write_
from gradsel.delta.sites import Site, is_base, originals_in, require_base, sites_of, tensor_of
from gradsel.files import require_folder
from gradsel.parameters import checkpoint_names
from gradsel.parameters.fingerprints import fingerprint
from gradsel.tables import printable, shape_text

#: The largest fraction of entries that may differ for a delta to be worth making.
MOST_DIFFERING = 0.5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECKPOINT = "a .safetensors file, an index of shards (*.safetensors.index.json), or a folder with either"
_MODEL = "a folder with the config.json of their model"


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    delta = commands.add_parser("delta", help=text)
    verbs = delta.add_subparsers(required=True, metavar="verb")

    info = _verb(verbs, "info", _info, "show what a delta sets, and how it was made")
    info.add_argument("delta", type=Path, metavar="FILE")
    info.add_argument("--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; shows both names of each tensor")

    apply = _verb(verbs, "apply", _apply, "write the tuned checkpoint from a base and a delta")
    for name in ("DELTA", "BASE", "OUT"):
        apply.add_argument(name.lower(), type=Path, metavar=name, help=_CHECKPOINT if name == "BASE" else None)
    apply.add_argument("--force", action="store_true", help="apply it even if BASE is not what the delta was made on")

    revert = _verb(verbs, "revert", _revert, "write the base of a tuned checkpoint, from a delta made --with-originals")
    for name in ("DELTA", "TUNED", "OUT"):
        revert.add_argument(name.lower(), type=Path, metavar=name, help=_CHECKPOINT if name == "TUNED" else None)
    revert.add_argument(
        "--force", action="store_true", help="revert it even if TUNED is not the base with the delta applied"
    )

    for verb, checkpoint in ((apply, "BASE"), (revert, "TUNED")):
        verb.add_argument(
            "--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; default: beside {checkpoint} or DELTA"
        )

    diff = _verb(verbs, "diff", _diff, "how many entries two deltas share, and how many of these differ")
    for name in ("A", "B"):
        diff.add_argument(name.lower(), type=Path, metavar=name)
    diff.add_argument(
        "--model", type=Path, metavar="FOLDER", help=f"{_MODEL}, which tells their names apart; default: beside A or B"
    )

    merge = _verb(verbs, "merge", _merge, "write the delta that sets the entries of two deltas of one base")
    for name in ("A", "B", "OUT"):
        merge.add_argument(name.lower(), type=Path, metavar=name)
    merge.add_argument(
        "--wins", choices=("neither", "first", "second"), default="neither",
        help="whose value to take of an entry that both set differently; default: neither, such deltas are refused",
    )  # fmt: skip
    merge.add_argument("--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; the result has the names of the model")
    merge.add_argument("--force", action="store_true", help="also merge values that are NaN or infinite")

    make = _verb(verbs, "make", _make, "make the delta of two checkpoints: all entries whose bits differ")
    for name in ("BASE", "TUNED", "OUT"):
        make.add_argument(name.lower(), type=Path, metavar=name, help=None if name == "OUT" else _CHECKPOINT)
    make.add_argument(
        "--with-originals",
        action="store_true",
        help="also save the replaced entries, so that the delta can be reverted",
    )
    make.add_argument("--force", action="store_true", help="also save values that are NaN or infinite")
    make.add_argument(
        "--dtype", choices=list(_DTYPES), help="round the values to this dtype; default: exactly those of TUNED"
    )

    lora = _verb(verbs, "lora", _lora, "write a delta as a LoRA adapter, which PEFT, vLLM and others load")
    for name in ("DELTA", "OUT"):
        lora.add_argument(name.lower(), type=Path, metavar=name, help="a folder" if name == "OUT" else None)
    lora.add_argument("--base", type=Path, metavar="BASE", help=f"{_CHECKPOINT}; needed unless DELTA has originals")
    lora.add_argument("--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; default: beside BASE or DELTA")
    lora.add_argument("--rank", type=int, metavar="R", help="the highest rank allowed; default: what DELTA needs")
    lora.add_argument(
        "--above", choices=get_args(Above), default="refuse",
        help="what to do with layers that need more: refuse them, split DELTA into several adapters whose sum is "
        "exact, or take the nearest adapter (svd) and report its error; default: refuse",
    )  # fmt: skip
    lora.add_argument("--dtype", choices=list(_DTYPES), help="of the adapter; default: float32")
    lora.add_argument("--pad", action="store_true", help="give all layers the same rank, with zeros")
    lora.add_argument("--drop", action="store_true", help="leave out what LoRA cannot hold, and list it")


def _verb(
    verbs: argparse._SubParsersAction, name: str, function: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)

    def command(arguments: argparse.Namespace) -> int:
        try:
            function(arguments)
        except (ValueError, OSError) as error:
            print(printable(f"gradsel delta {name}: {error}".replace("force=True", "--force")), file=sys.stderr)
            return 1
        return 0

    parser.set_defaults(command=command)
    return parser


def _say(text: object) -> None:
    """Prints lines, which may have names from a file in them."""
    for line in str(text).split("\n"):
        print(printable(line))


def _info(arguments: argparse.Namespace) -> None:
    delta = Delta.load(arguments.delta, force=True)
    _say(delta)
    total = len(delta)
    for what, count in (
        ("quick check of the base", sum(bool(part.digest) for part in delta.values())),
        ("full check of the base", sum(bool(part.fingerprint) for part in delta.values())),
        ("originals, to revert", sum(part.originals is not None for part in delta.values())),
    ):
        _say(f"{what}: {count} of {total} tensors")
    _say(f"{arguments.delta}: {arguments.delta.stat().st_size:,} bytes")
    if arguments.model is not None:
        for name, others in other_names(_model(arguments.model), delta).items():
            _say(f"{name}: {', '.join(others)}")


# --- Adapters ----------------------------------------------------------------------------------------------------


def _lora(arguments: argparse.Namespace) -> None:
    delta = Delta.load(arguments.delta)
    if arguments.base is not None:
        delta = _with_originals(delta, Checkpoint(arguments.base), arguments)
    if arguments.model is not None:
        model: nn.Module | None = _model(arguments.model)
    else:
        beside = [] if arguments.base is None else [Checkpoint(arguments.base).path.parent]
        model = next(filter(None, map(checkpoint_names.model_of, [*beside, arguments.delta.parent])), None)
    dtype = None if arguments.dtype is None else _DTYPES[arguments.dtype]
    try:
        export = delta.to_lora(
            arguments.out, model, arguments.rank, dtype, arguments.drop, above=arguments.above, pad=arguments.pad
        )
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from None
    _say(export)


def _as_options(message: str) -> str:
    """The message of ``Delta.to_lora`` with the names that its parameters have as options."""
    for parameter, option in (
        ("rank=", "--rank "), ("above='svd'", "--above svd"), ("above='split'", "--above split"),
        ("drop=True", "--drop"), ("base= as a model", "--model"), ("base=", "--base"), ("dtype=", "--dtype"),
    ):  # fmt: skip
        message = message.replace(parameter, option)
    return message


def _with_originals(delta: Delta, base: Checkpoint, arguments: argparse.Namespace) -> Delta:
    """The delta with the entries of the base that it replaces, by the names of the base."""

    def attempt(parts: Mapping[str, Part], force: bool) -> Mapping[str, Part]:
        found = {}
        for name, part in parts.items():
            if not part.mask.is_whole:
                tensor = tensor_of(name, part, base, force)
                part = replace(part, originals=originals_of(name, part, {name: tensor}))
            found[name] = part
        return found

    return Delta(fitted(delta, in_checkpoint(base, _folders(arguments, base)), False, attempt), delta.notes)


# --- Checkpoints written -----------------------------------------------------------------------------------------


def _apply(arguments: argparse.Namespace) -> None:
    require_no_overwrite([arguments.out], [arguments.delta])

    def change(name: str, part: Part, tensor: Tensor, force: bool) -> Tensor:
        site = _site(name, part, tensor, force)
        originals_in([site], force)
        write_(tensor, part, site.values)
        return tensor

    source = Checkpoint(arguments.base)
    delta = Delta.load(arguments.delta, force=arguments.force)
    there = in_checkpoint(source, _folders(arguments, source))
    _change(delta, there, source, arguments, change)


def _revert(arguments: argparse.Namespace) -> None:
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
    there = in_checkpoint(source, _folders(arguments, source), is_tuned=True)
    _change(delta, there, source, arguments, change)


def _site(name: str, part: Part, tensor: Tensor, force: bool) -> Site:
    return sites_of({name: part}, {name: tensor}, force)[0]


def _folders(arguments: argparse.Namespace, source: Checkpoint) -> list[Path]:
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
        _say(file)
    for name, part in heads.items():
        _say(f"{name} is the task's, {shape_text(part.mask.shape)}; BASE has {_size(source, name)}")
    if heads and config is None:
        _say("If a config.json says how many classes the model has, it must say the task's number")


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
        folders = _folders(arguments, source)
    else:
        return None
    return next((file for file in (folder / "config.json" for folder in folders) if file.exists()), None)


# --- Deltas compared and combined --------------------------------------------------------------------------------


def _diff(arguments: argparse.Namespace) -> None:
    a, b = (Delta.load(path, force=True) for path in (arguments.a, arguments.b))
    a, b = _alike(arguments, a, b)
    _say(a.difference(b))
    if not a.keys() & b.keys():
        _say(
            "They have no tensor in common. If one has the names of a model, and the other those of its checkpoints, "
            "pass --model FOLDER"
        )


def _merge(arguments: argparse.Namespace) -> None:
    require_folder(arguments.out)
    require_no_overwrite([arguments.out], [arguments.a, arguments.b])
    a, b = (Delta.load(path, force=arguments.force) for path in (arguments.a, arguments.b))
    a, b = _alike(arguments, a, b)
    collisions = a.difference(b).differing
    wins = {"neither": "neither", "first": "self", "second": "other"}[arguments.wins]
    try:
        merged = a.merged(b, wins=wins)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error).replace("say which wins", "pass --wins first or --wins second")) from None
    merged.save(arguments.out, originals=all(p.originals is not None for p in merged.values()), force=arguments.force)
    _say(f"{merged!r}; {collisions:,} entries were set differently by the two\n{arguments.out}")


def _alike(arguments: argparse.Namespace, a: Delta, b: Delta) -> tuple[Delta, Delta]:
    """Two deltas by the names of their model, if these are known and needed."""
    model = None if arguments.model is None else _model(arguments.model)
    try:
        if model is None and a.keys() != b.keys():
            found = map(checkpoint_names.model_of, (arguments.a.parent, arguments.b.parent))
            model = next(filter(None, found), None)
        if model is not None:
            return _in_model(model, a), _in_model(model, b)
    except ValueError:
        if arguments.model is not None:  # otherwise nobody has said that these folders are about the deltas
            raise
    return a, b


def _in_model(model: nn.Module, delta: Delta) -> Delta:
    return Delta(by_names_in(model, delta), delta.notes)


def _model(folder: Path) -> nn.Module:
    model = checkpoint_names.model_of(folder)
    if model is None:
        raise ValueError(f"{folder} has no config.json that names a model of transformers")
    return model


# --- Deltas made -------------------------------------------------------------------------------------------------


def _make(arguments: argparse.Namespace) -> None:
    require_folder(arguments.out)
    base, checkpoint = Checkpoint(arguments.base), Checkpoint(arguments.tuned)
    require_no_overwrite([arguments.out], [*base.files, *checkpoint.files])
    checkpoint = checkpoint.without_values(base)
    tuned = named_alike(checkpoint, base)
    heads = [name for name in tuned if name not in base or _is_resized(tuned[name].shape, base.shapes[name])]
    _require_few(base, tuned, heads)
    dtype = None if arguments.dtype is None else _DTYPES[arguments.dtype]
    found = {}
    for name in tuned:
        part = whole(name, tuned[name], dtype) if name in heads else differing(name, base[name], tuned[name], dtype)
        if part is not None:
            found[name] = part
    notes = {"policy": "entries that differ", "base": arguments.base.name, "tuned": arguments.tuned.name}
    delta = Delta(found, notes)
    delta.save(arguments.out, originals=arguments.with_originals, force=arguments.force)
    _say(
        f"{delta!r}\n{arguments.out}: {arguments.out.stat().st_size:,} bytes; the checkpoint has {checkpoint.nbytes:,}"
    )
    if heads:
        _say(f"{len(heads)} tensors are not in BASE, or of another size there, first {heads[0]}: they are set whole")
    if lost := [name for name in base if name not in tuned]:
        _say(f"{len(lost)} tensors of BASE are not in TUNED, first {lost[0]}: the delta leaves them as they are")


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
