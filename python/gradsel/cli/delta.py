"""``gradsel delta``: deltas of safetensors checkpoints, tensor by tensor, without the model's code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

from torch import nn

from gradsel.cli.delta_of_checkpoints import DTYPES, apply, folders_of, make, revert
from gradsel.cli.running import say
from gradsel.delta.adapter_files import originals_of
from gradsel.delta.checkpoints import Checkpoint, require_no_overwrite
from gradsel.delta.delta import Delta
from gradsel.delta.fitting import by_names_in, fitted, in_checkpoint, other_names
from gradsel.delta.hub import find
from gradsel.delta.lora import Above
from gradsel.delta.parts import Part
from gradsel.delta.sites import tensor_of
from gradsel.files import require_folder
from gradsel.parameters import checkpoint_names
from gradsel.tables import printable

_CHECKPOINT = "a .safetensors file, an index of shards (*.safetensors.index.json), or a folder with either"
_FILES = {"DELTA": "the file of a delta", "OUT": "what to write: a file, or a folder if the checkpoint is one"}
_MODEL = "a folder with the config.json of their model"


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    delta = commands.add_parser("delta", help=text)
    verbs = delta.add_subparsers(metavar="verb")

    info = _verb(verbs, "info", _info, "show what a delta sets, and how it was made")
    info.add_argument(
        "delta", type=Path, metavar="DELTA", help="a file, a folder with a delta, or the id of one on a model hub"
    )
    info.add_argument("--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; shows both names of each tensor")

    to_apply = _verb(verbs, "apply", apply, "write the tuned checkpoint from a base and a delta")
    for name in ("DELTA", "BASE", "OUT"):
        to_apply.add_argument(
            name.lower(), type=Path, metavar=name, help=_CHECKPOINT if name == "BASE" else _FILES[name]
        )
    to_apply.add_argument(
        "--force", action="store_true", help="apply it even if BASE is not what the delta was made on"
    )

    to_revert = _verb(
        verbs, "revert", revert, "write the base of a tuned checkpoint, from a delta made --with-originals"
    )
    for name in ("DELTA", "TUNED", "OUT"):
        to_revert.add_argument(
            name.lower(), type=Path, metavar=name, help=_CHECKPOINT if name == "TUNED" else _FILES[name]
        )
    to_revert.add_argument(
        "--force", action="store_true", help="revert it even if TUNED is not the base with the delta applied"
    )

    for verb, checkpoint in ((to_apply, "BASE"), (to_revert, "TUNED")):
        verb.add_argument(
            "--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; default: beside {checkpoint} or DELTA"
        )

    diff = _verb(verbs, "diff", _diff, "how many entries two deltas share, and how many of these differ")
    for name in ("A", "B"):
        diff.add_argument(name.lower(), type=Path, metavar=name, help="the file of a delta")
    diff.add_argument(
        "--model", type=Path, metavar="FOLDER", help=f"{_MODEL}, which tells their names apart; default: beside A or B"
    )

    merge = _verb(verbs, "merge", _merge, "write the delta that sets the entries of two deltas of one base")
    for name in ("A", "B", "OUT"):
        merge.add_argument(
            name.lower(), type=Path, metavar=name, help="the file to write" if name == "OUT" else "the file of a delta"
        )
    merge.add_argument(
        "--wins", choices=("neither", "first", "second"), default="neither",
        help="whose value to take of an entry that both set differently; default: neither, such deltas are refused",
    )  # fmt: skip
    merge.add_argument("--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; the result has the names of the model")
    merge.add_argument("--force", action="store_true", help="also merge values that are NaN or infinite")

    to_make = _verb(verbs, "make", make, "make the delta of two checkpoints: all entries whose bits differ")
    for name in ("BASE", "TUNED", "OUT"):
        to_make.add_argument(
            name.lower(), type=Path, metavar=name, help="the file to write" if name == "OUT" else _CHECKPOINT
        )
    to_make.add_argument(
        "--with-originals",
        action="store_true",
        help="also save the replaced entries, so that the delta can be reverted",
    )
    to_make.add_argument("--force", action="store_true", help="also save values that are NaN or infinite")
    to_make.add_argument(
        "--dtype", choices=list(DTYPES), help="round the values to this dtype; default: exactly those of TUNED"
    )

    lora = _verb(verbs, "lora", _lora, "write a delta as a LoRA adapter, which PEFT, vLLM and others load")
    for name in ("DELTA", "OUT"):
        lora.add_argument(
            name.lower(), type=Path, metavar=name, help="the folder to write" if name == "OUT" else _FILES[name]
        )
    lora.add_argument("--base", type=Path, metavar="BASE", help=f"{_CHECKPOINT}; needed unless DELTA has originals")
    lora.add_argument("--model", type=Path, metavar="FOLDER", help=f"{_MODEL}; default: beside BASE or DELTA")
    lora.add_argument("--rank", type=int, metavar="R", help="the highest rank allowed; default: what DELTA needs")
    lora.add_argument(
        "--above", choices=get_args(Above), default="refuse",
        help="what to do with layers that need more: refuse them, split DELTA into several adapters whose sum is "
        "exact, or take the nearest adapter (svd) and report its error; default: refuse",
    )  # fmt: skip
    lora.add_argument("--dtype", choices=list(DTYPES), help="of the adapter; default: float32")
    lora.add_argument("--pad", action="store_true", help="give all layers the same rank, with zeros")
    lora.add_argument("--drop", action="store_true", help="leave out what LoRA cannot hold, and list it")


def _verb(
    verbs: argparse._SubParsersAction, name: str, function: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help)

    def command(arguments: argparse.Namespace) -> int:
        try:
            function(arguments)
        except (ValueError, OSError) as error:
            told = str(error).replace("force=True", "--force")
            if isinstance(error, OSError) and error.filename is not None:
                told = f"{error.filename}: {error.strerror}"
            print(printable(f"gradsel delta {name}: {told}"), file=sys.stderr)
            return 1
        return 0

    parser.set_defaults(command=command)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    path = find(arguments.delta)
    delta = Delta.load(path, force=True)
    say(delta)
    total = len(delta)
    for what, count in (
        ("quick check of the base", sum(bool(part.digest) for part in delta.values())),
        ("full check of the base", sum(bool(part.fingerprint) for part in delta.values())),
        ("originals, to revert", sum(part.originals is not None for part in delta.values())),
    ):
        say(f"{what}: {count} of {total} tensors")
    say(f"{path}: {path.stat().st_size:,} bytes")
    if arguments.model is not None:
        for name, others in other_names(_model(arguments.model), delta).items():
            say(f"{name}: {', '.join(others)}")


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
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    try:
        export = delta.to_lora(
            arguments.out, model, arguments.rank, dtype, arguments.drop, above=arguments.above, pad=arguments.pad
        )
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from None
    say(export)


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

    return Delta(fitted(delta, in_checkpoint(base, folders_of(arguments, base)), False, attempt), delta.notes)


# --- Deltas compared and combined --------------------------------------------------------------------------------


def _diff(arguments: argparse.Namespace) -> None:
    a, b = (Delta.load(path, force=True) for path in (arguments.a, arguments.b))
    a, b = _alike(arguments, a, b)
    say(a.difference(b))
    if not a.keys() & b.keys():
        say(
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
    say(f"{merged!r}; {collisions:,} entries were set differently by the two\n{arguments.out}")


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
