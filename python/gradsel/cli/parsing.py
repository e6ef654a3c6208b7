"""How a command line that cannot be read is answered: by one line, with the name that was probably meant."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from gradsel.cli.examples import shown
from gradsel.errors import did_you_mean

#: argparse's message about a word that is none of those expected.
_CHOICE = re.compile(r"argument (?P<what>.+?): invalid choice: '(?P<wrong>[^']*)' \(choose from (?P<known>.*)\)")


class _Commands(argparse._SubParsersAction):
    """Commands whose own help begins with what the list of all of them says, as a sentence."""

    def add_parser(self, name: str, **kwargs: Any) -> Any:
        help = kwargs["help"]
        kwargs.setdefault("description", f"{help[0].upper()}{help[1:]}.")
        return super().add_parser(name, **kwargs)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` with short messages; one with subcommands prints its help if none is given.

    The help ends with the command's examples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)  # leaves the lines of examples
        super().__init__(*args, **kwargs)
        self.description = self.description and textwrap.fill(self.description, 80)
        self.epilog = shown(self.prog)

    def add_subparsers(self, **kwargs: Any) -> Any:
        self.set_defaults(command=lambda _: self.print_help())
        return super().add_subparsers(action=_Commands, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            options = [option for action in self._actions for option in action.option_strings]
            word = extra[0].partition("=")[0]
            hint = did_you_mean(word.lstrip("-"), [option[2:] for option in options if option.startswith("--")])
            hint = hint.replace("mean ", "mean --")  # the dashes, which all have, would make any two names alike
            self.error(f"there is no option {word}{hint}" if word.startswith("-") else f"{word!r} is one word too many")
        return found, extra

    def error(self, message: str) -> NoReturn:
        if found := _CHOICE.match(message):
            known = [word.strip().strip("'") for word in found["known"].split(",")]
            what, wrong, hint = found["what"], found["wrong"], did_you_mean(found["wrong"], known)
            said = f"{what} is {wrong!r}" if what.startswith("-") else f"there is no {what} {wrong!r}"
            message = f"{said}{hint or '; expected one of ' + ', '.join(known)}"
        self.exit(2, f"{self.prog}: {message}{' ' if message.endswith('?') else '. '}See {self.prog} --help\n")
