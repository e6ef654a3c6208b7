"""Every block of code in README and docs/ runs as it stands, and every command is one that the command line knows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gradsel.cli import main as cli
from tests.documentation import blocks as documentation

ROOT = Path(__file__).parents[2]
PAGES = documentation.pages()
RUN = [page for page in PAGES if not page.startswith(documentation.EXAMPLES) and page not in documentation.WITH_A_TEST]
WITH_PYTHON = [page for page in RUN if any(block.language == "python" for block in documentation.blocks(page))]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = documentation.GIVEN.get(page, documentation.a_model)()
    for block in documentation.blocks(page):
        if block.language != "python" or documentation.found_for(documentation.NOT_RUN, page, block):
            continue
        if anew := documentation.found_for(documentation.ANEW, page, block):
            names = anew()
        lines = "\n" * (block.line - 1)  # so that a traceback has the lines of the page
        exec(compile(lines + block.code, str(ROOT / page), "exec"), names)


@pytest.mark.parametrize("table", ["NOT_RUN", "ANEW"])
def test_what_is_said_of_blocks_is_said_of_blocks_that_exist(table):
    for page, line in getattr(documentation, table):
        assert any(line in block.code for block in documentation.blocks(page)), f"{page} has no block with {line!r}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    for block in documentation.blocks(page):
        if block.language == "python":
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            check_command(line, page)


def check_command(line: str, page: str) -> None:
    text = re.sub(r"\[[^\[\]]*\]", "", line)  # options in brackets
    program, *words = shlex.split(text, comments=True) or [""]
    if program == "torchrun":
        assert words[2:4] == ["-m", "gradsel"], f"{page}: {line}"
        program, words = "gradsel", words[4:]
    if program == "gradsel":
        cli.parser(words).parse_args(words)  # exits with what is wrong
    elif program == "make":
        assert {word for word in words if "=" not in word} <= TARGETS, f"{page}: {line}"
    elif program == "pip":
        assert words[0] == "install", f"{page}: {line}"


def test_targets_of_make_exist():
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text()))
        assert named <= TARGETS, f"{page} names make {', '.join(named - TARGETS)}"


def test_the_first_command_is_a_whole_configuration(capsys):
    code = "\n".join(block.code for block in documentation.blocks("README.md"))
    line = next(line for line in code.splitlines() if line.startswith("gradsel finetune"))
    assert cli.main([*shlex.split(line)[1:], "--print-config"]) == 0
    assert "path: birds/" in capsys.readouterr().out
