"""The command line's own options, and what it says to a line that it cannot read."""

from __future__ import annotations

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
