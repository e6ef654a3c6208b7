"""``gradsel push``: puts a result of ``gradsel finetune``, or a delta, on a model hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradsel.cli.running import is_first, run
from gradsel.errors import RunError, expected


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("push", help=text)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE",
        help="what gradsel finetune wrote; or a delta, as a file or in a folder that save_pretrained wrote",
    )  # fmt: skip
    parser.add_argument("repo", metavar="USER/NAME", help="where to; it is made if it does not exist")
    parser.add_argument("--base", metavar="NAME", help="of a delta: the base model on the hub, which the card names")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--token", help="of the hub; default: the one that hf auth login has stored")
    parser.set_defaults(command=_push)


def _push(arguments: argparse.Namespace) -> int:
    def command() -> None:
        if is_first():
            print(_pushed(arguments))

    return run("push", command)


def _pushed(arguments: argparse.Namespace) -> str:
    from gradsel.delta import Delta
    from gradsel.delta.hub import FILE
    from gradsel.training import Result

    source, private = arguments.source, arguments.private or None
    if not source.exists():
        raise RunError(f"there is no file or folder {source}")
    if source.is_file() or (source / FILE).is_file():
        with expected():
            delta = Delta.from_pretrained(source)
            return delta.push_to_hub(arguments.repo, base=arguments.base, private=private, token=arguments.token)
    if arguments.base is not None:
        raise RunError(f"--base is for a delta, but {source} is a result of gradsel finetune, which knows its base")
    return Result.from_pretrained(source).push_to_hub(arguments.repo, private=private, token=arguments.token)
