"""The documentation names what exists: every public name has an entry in the API pages, and links have targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gradsel
import gradsel_kernels

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("package", [gradsel, gradsel_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_api_pages(package):
    pages = "\n".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    listed = re.findall(rf"^::: {package.__name__}\.(\w+)$", pages, re.MULTILINE)
    assert sorted(listed) == sorted(set(package.__all__) - {"__version__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
