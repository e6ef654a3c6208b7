"""The examples run as they are, in a folder of their own, and the documentation shows what they are."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "made.py")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_without_arguments(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.syspath_prepend(path.parent)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    for accuracy in re.findall(r"top-1 ([\d.]+) %", printed):
        assert float(accuracy) > 60  # of two or three classes
    assert re.search(r"\d bytes|report.html", printed)
    assert sorted(os.listdir(tmp_path)) == ["made", "runs"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_page_shows_it(path):
    shown = f"\n```python\n{path.read_text()}```\n"
    pages = [page.name for page in ROOT.glob("docs/howto/*.md") if shown in page.read_text()]
    assert len(pages) == 1, f"no page in docs/howto shows {path.name} as it is; copy it there"
