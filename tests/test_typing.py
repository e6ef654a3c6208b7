"""The public API has types: a user's script that uses every name passes ``mypy --strict``, and nothing in it is Any."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradsel
import gradsel_kernels as gk

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "typing" / "users_script.py"
pytest.importorskip("mypy", reason="mypy is not installed")


def mypy(*files: Path) -> str:
    """What mypy prints for a user's files. pyproject.toml says what is strict; the cache is that of ``make lint``."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def printed():
    return mypy(SCRIPT)


def short(revealed: str) -> str:
    """A type as a reader would write it: without modules."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", revealed)


def test_it_has_no_errors(printed):
    errors = [line for line in printed.splitlines() if ": note: " not in line]
    assert not errors, "\n".join(errors)


def test_types_are_those_in_the_comments(printed):
    found = {int(line): short(text) for line, text in re.findall(r":(\d+): note: Revealed type is \"(.*)\"", printed)}
    lines = SCRIPT.read_text().splitlines()
    expected = {
        number: line.rpartition("# ")[2] for number, line in enumerate(lines, 1) if line.startswith("reveal_type(")
    }
    assert found == expected


@pytest.mark.parametrize(("package", "short_name"), [(gradsel, "gradsel"), (gk, "gk")])
def test_every_public_name_is_used(package, short_name):
    text = SCRIPT.read_text()
    unused = [name for name in package.__all__ if not re.search(rf"\b{short_name}\.{name}\b", text)]
    assert not unused


def test_a_misspelt_name_is_an_error(tmp_path):
    script = tmp_path / "misspelt.py"
    script.write_text("import gradsel\n\ngradsel.selct\n")
    assert 'has no attribute "selct"' in mypy(script)
