"""``gradsel delta``: deltas of safetensors checkpoints, tensor by tensor, without the model's code."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gradsel.delta.checkpoints import Checkpoint, require_no_overwrite, rewrite
from gradsel.delta.delta import Delta
from gradsel.delta.fitting import Destination, by_names_in, fitted, in_checkpoint, named_alike, other_names
from gradsel.delta.making import differing
from gradsel.delta.parts import Part, bits_of, entries_of, read, same_bits, write_
from gradsel.delta.sites import Site, originals_in, require_base, sites_of
from gradsel.integrations import checkpoint_names

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

    make = _verb(verbs, "make", _make, "make the delta of two checkpoints: all entries whose bits differ")
    for name in ("BASE", "TUNED", "OUT"):
        make.add_argument(name.lower(), type=Path, metavar=name, help=None if name == "OUT" else _CHECKPOINT)
    make.add_argument(
        "--with-originals",
        action="store_true",
        help="also save the replaced entries, so that the delta can be reverted",
    )
    make.add_argument(
        "--dtype", choices=list(_DTYPES), help="round the values to this dtype; default: exactly those of TUNED"
    )


def _verb(
    verbs: argparse._SubParsersAction, name: str, function: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)

    def command(arguments: argparse.Namespace) -> int:
        try:
            function(arguments)
        except (ValueError, OSError) as error:
            print(f"gradsel delta {name}: {error}", file=sys.stderr)
            return 1
        return 0

    parser.set_defaults(command=command)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    delta = Delta.load(arguments.delta, force=True)
    print(delta)
    total = len(delta)
    for what, count in (
        ("quick check of the base", sum(bool(part.digest) for part in delta.values())),
        ("full check of the base", sum(bool(part.fingerprint) for part in delta.values())),
        ("originals, to revert", sum(part.originals is not None for part in delta.values())),
    ):
        print(f"{what}: {count} of {total} tensors")
    print(f"{arguments.delta}: {arguments.delta.stat().st_size:,} bytes")
    if arguments.model is not None:
        for name, others in other_names(_model(arguments.model), delta).items():
            print(f"{name}: {', '.join(others)}")


def _apply(arguments: argparse.Namespace) -> None:
    require_no_overwrite(arguments.out, [arguments.delta])

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
    require_no_overwrite(arguments.out, [arguments.delta])
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
            require_base([] if tuned and read(tensor, part)[1] == part.digest else [name], len(delta))
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

    def attempt(parts: Mapping[str, Part], force: bool) -> Mapping[str, Part]:
        for name in parts:
            if name not in source:
                raise ValueError(f"{source.path} has no {name!r}, which the delta sets; it was made for another model")
        for name, part in parts.items():
            change(name, part, source[name], force)
        return parts

    parts = fitted(delta, there, arguments.force, attempt)

    def changed(name: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: change(name, parts[name], tensor, arguments.force)

    files = rewrite(source, arguments.out, {name: changed(name) for name in parts})
    if parts is not delta and arguments.out.is_dir():  # the names there need to be translated, too
        files += _copied_config(_folders(arguments, source), arguments.out)
    for file in files:
        print(file)


def _copied_config(folders: Sequence[Path], out: Path) -> list[Path]:
    """Copies the config.json that says which model it is to a folder that has none; returns what was written."""
    found = [folder / "config.json" for folder in folders if (folder / "config.json").exists()]
    copy = out / "config.json"
    if not found or copy.exists():
        return []
    shutil.copyfile(found[0], copy)
    return [copy]


def _diff(arguments: argparse.Namespace) -> None:
    a, b = (Delta.load(path, force=True) for path in (arguments.a, arguments.b))
    if arguments.model is not None:
        a, b = (_in_model(_model(arguments.model), delta) for delta in (a, b))
    elif a.keys() != b.keys():
        with contextlib.suppress(ValueError):  # nobody has said that these folders are about the deltas
            found = map(checkpoint_names.model_of, (arguments.a.parent, arguments.b.parent))
            if (model := next(filter(None, found), None)) is not None:
                a, b = (_in_model(model, delta) for delta in (a, b))
    print(a.difference(b))
    if not a.keys() & b.keys():
        print(
            "They have no tensor in common. If one has the names of a model, and the other those of its checkpoints, "
            "pass --model FOLDER"
        )


def _in_model(model: nn.Module, delta: Delta) -> Delta:
    return Delta(by_names_in(model, delta), delta.notes)


def _model(folder: Path) -> nn.Module:
    model = checkpoint_names.model_of(folder)
    if model is None:
        raise ValueError(f"{folder} has no config.json that names a model of transformers")
    return model


def _make(arguments: argparse.Namespace) -> None:
    base, checkpoint = Checkpoint(arguments.base), Checkpoint(arguments.tuned)
    require_no_overwrite(arguments.out, [*base.files, *checkpoint.files])
    tuned = named_alike(checkpoint, base)
    for these, those, which in ((base, tuned, "tuned"), (tuned, base, "base")):
        if missing := [name for name in these if name not in those]:
            raise ValueError(f"the {which} checkpoint lacks {len(missing)} tensors, first {missing[0]}")
    _require_few(base, tuned)
    dtype = None if arguments.dtype is None else _DTYPES[arguments.dtype]
    parts = {name: differing(name, base[name], tuned[name], dtype) for name in tuned}
    found = {name: part for name, part in parts.items() if part is not None}
    notes = {"policy": "entries that differ", "base": arguments.base.name, "tuned": arguments.tuned.name}
    delta = Delta(found, notes)
    delta.save(arguments.out, originals=arguments.with_originals)
    print(
        f"{delta!r}\n{arguments.out}: {arguments.out.stat().st_size:,} bytes; the checkpoint has {checkpoint.nbytes:,}"
    )


def _require_few(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    count, total, worst = 0, 0, ("", 0.0)
    for name in tuned:
        ours, theirs = tuned[name], base[name]
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            continue  # differing() reports it
        moved = int((bits_of(ours) != bits_of(theirs)).sum())
        count, total = count + moved, total + ours.numel()
        worst = max(worst, (name, moved / max(ours.numel(), 1)), key=lambda pair: pair[1])
    if count > MOST_DIFFERING * total:
        raise ValueError(
            f"{count:,} of {total:,} entries differ "
            f"({100 * count / total:.1f} %; {100 * worst[1]:.1f} % of {worst[0]}): "
            "this is not sparse fine-tuning, and a delta would be about as large as the checkpoint"
        )
