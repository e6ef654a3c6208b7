"""``gradsel delta``: deltas of safetensors checkpoints, tensor by tensor, without the model's code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gradsel.delta.applying import Site, originals_in, require_base, sites_of
from gradsel.delta.checkpoints import Checkpoint, require_no_overwrite, rewrite
from gradsel.delta.delta import Delta
from gradsel.delta.making import differing
from gradsel.delta.parts import Part, bits_of, entries_of, read, same_bits, write_

#: The largest fraction of entries that may differ for a delta to be worth making.
MOST = 0.5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECKPOINT = "a .safetensors file, an index of shards (*.safetensors.index.json), or a folder with either"


def add_to(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of ``gradsel``."""
    delta = commands.add_parser(
        "delta", help="the difference that fine-tuning makes to a checkpoint: make, inspect, apply and revert it"
    )
    verbs = delta.add_subparsers(required=True, metavar="verb")

    info = _verb(verbs, "info", _info, "show what a delta sets, and how it was made")
    info.add_argument("delta", type=Path, metavar="FILE")

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

    diff = _verb(verbs, "diff", _diff, "how many entries two deltas share, and how many of these differ")
    for name in ("A", "B"):
        diff.add_argument(name.lower(), type=Path, metavar=name)

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


def _apply(arguments: argparse.Namespace) -> None:
    require_no_overwrite(arguments.out, [arguments.delta])

    def change(name: str, part: Part, tensor: Tensor) -> Tensor:
        site = _site(name, part, tensor, arguments.force)
        originals_in([site], arguments.force)
        write_(tensor, part, site.values)
        return tensor

    _change(Delta.load(arguments.delta, force=arguments.force), Checkpoint(arguments.base), arguments.out, change)


def _revert(arguments: argparse.Namespace) -> None:
    require_no_overwrite(arguments.out, [arguments.delta])
    delta = Delta.load(arguments.delta, force=True)
    if lost := [name for name, part in delta.items() if part.originals is None]:
        raise ValueError(
            f"{arguments.delta} does not have the original entries of {len(lost)} tensors, first {lost[0]}: only "
            "deltas saved with them (--with-originals, save(originals=True)) can be reverted without the base"
        )

    def change(name: str, part: Part, tensor: Tensor) -> Tensor:
        site = _site(name, part, tensor, arguments.force)
        tuned = same_bits(entries_of(tensor, part), site.values)
        assert part.originals is not None
        write_(tensor, part, part.originals.reshape(-1).to(tensor.dtype))
        if not arguments.force:
            require_base([] if tuned and read(tensor, part)[1] == part.digest else [name], len(delta))
        return tensor

    _change(delta, Checkpoint(arguments.tuned), arguments.out, change)


def _site(name: str, part: Part, tensor: Tensor, force: bool) -> Site:
    return sites_of({name: part}, {name: tensor}, force)[0]


def _change(delta: Delta, source: Checkpoint, out: Path, change: Callable[[str, Part, Tensor], Tensor]) -> None:
    """Rewrites the tensors that the delta touches, after checking that all of them fit."""
    for name, part in delta.items():
        if name not in source:
            raise ValueError(f"{source.path} has no {name!r}, which the delta sets; it was made for another model")
        change(name, part, source[name])

    def changed(name: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: change(name, delta[name], tensor)

    for file in rewrite(source, out, {name: changed(name) for name in delta}):
        print(file)


def _diff(arguments: argparse.Namespace) -> None:
    print(Delta.load(arguments.a, force=True).difference(Delta.load(arguments.b, force=True)))


def _make(arguments: argparse.Namespace) -> None:
    base, tuned = Checkpoint(arguments.base), Checkpoint(arguments.tuned)
    require_no_overwrite(arguments.out, [*base.files, *tuned.files])
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
    print(f"{delta!r}\n{arguments.out}: {arguments.out.stat().st_size:,} bytes; the checkpoint has {tuned.nbytes:,}")


def _require_few(base: Checkpoint, tuned: Checkpoint) -> None:
    count, total, worst = 0, 0, ("", 0.0)
    for name in tuned:
        ours, theirs = tuned[name], base[name]
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            continue  # differing() reports it
        moved = int((bits_of(ours) != bits_of(theirs)).sum())
        count, total = count + moved, total + ours.numel()
        worst = max(worst, (name, moved / max(ours.numel(), 1)), key=lambda pair: pair[1])
    if count > MOST * total:
        raise ValueError(
            f"{count:,} of {total:,} entries differ "
            f"({100 * count / total:.1f} %; {100 * worst[1]:.1f} % of {worst[0]}): "
            "this is not sparse fine-tuning, and a delta would be about as large as the checkpoint"
        )
