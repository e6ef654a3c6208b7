"""The command line's own options, and what it says to a line that it cannot read."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

import gradsel
from gradsel.cli import main as cli


def test_config_and_version(capsys):
    assert cli.main(["config"]) == 0
    assert "gradsel_kernels" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert gradsel.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(("line", "names"), [("", cli.COMMANDS), ("delta", ["info", "apply"]), ("papers", ["show"])])
def test_without_a_command_the_help_lists_them(line, names, capsys):
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert all(f"    {name} " in printed for name in names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finetun", "gradsel: there is no command 'finetun'; did you mean finetune? See gradsel --help"),
        ("zzz", "gradsel: there is no command 'zzz'; expected one of finetune, evaluate, "),
        ("delta inf x", "gradsel delta: there is no verb 'inf'; did you mean info? See gradsel delta --help"),
        ("finetune --dta x", "gradsel finetune: there is no option --dta; did you mean --data? "),
        ("delta diff a b --output c", "gradsel delta diff: there is no option --output. See gradsel delta diff --help"),
        ("finetune --epoch=x", "gradsel finetune: argument --epochs: invalid int value: 'x'. "),
        ("delta lora a b --above spilt", "gradsel delta lora: --above is 'spilt'; did you mean split? "),
        ("delta info", "gradsel delta info: the following arguments are required: DELTA. "),
        ("config x", "gradsel config: 'x' is one word too many. "),
    ],
)
def test_a_line_that_cannot_be_read_gets_one(line, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(line.split())
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1


def test_traceback_may_be_the_last_word(capsys, monkeypatch):
    monkeypatch.setenv("GRADSEL_TRACEBACK", "")
    assert cli.main(["push", "nowhere", "user/birds", "--traceback"]) == 1
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert told.endswith("gradsel push: there is no file or folder nowhere\n")


def verbs_of(parser):
    return next((each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)), {})


def helps():
    """Every command, and every verb of one, with its parser."""
    yield "", cli.parser([])
    for name in cli.COMMANDS:
        command = verbs_of(cli.parser([name]))[name]
        yield name, command
        for verb, parser in verbs_of(command).items():
            yield f"{name} {verb}", parser


def test_help_has_examples_that_can_be_typed_and_fits_into_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, parser in helps():
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= 80, text
        shown = re.split(r"^examples?:\n", text, flags=re.MULTILINE)
        assert len(shown) == 2, f"gradsel {name} --help has no example"
        assert parser.description
        bare = [each.metavar for each in parser._actions if not each.help and not each.choices]
        assert not bare, f"gradsel {name} --help says nothing about {bare}"
        for line in shown[1].replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line)
            assert [program, *name.split()] == [program, *words][: 1 + len(name.split())]
            if "--help" not in words:
                cli.parser(words).parse_args(words)  # exits with what is wrong
