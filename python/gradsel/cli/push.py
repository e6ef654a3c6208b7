"""``gradsel push``: puts a result of ``gradsel finetune`` on a model hub."""

from __future__ import annotations

import argparse

from gradsel.cli.running import is_first, run


def add_to(commands: argparse._SubParsersAction, text: str) -> None:
    """Adds the command to those of ``gradsel``."""
    parser = commands.add_parser("push", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("folder", metavar="FOLDER", help="what gradsel finetune wrote")
    parser.add_argument("repo", metavar="USER/NAME", help="where to; it is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--token", help="of the hub; default: the one that hf auth login has stored")
    parser.set_defaults(command=_push)


def _push(arguments: argparse.Namespace) -> int:
    def command() -> None:
        if not is_first():
            return
        from gradsel.training import Result

        result = Result.from_pretrained(arguments.folder)
        print(result.push_to_hub(arguments.repo, private=arguments.private or None, token=arguments.token))

    return run("push", command)
