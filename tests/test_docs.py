"""The documentation is true to the repository.

Public names are in the API pages, links have targets, named files exist, and figures are those of the results.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import gradsel
import gradsel_kernels
from benchmarks.harness.environment import RESULTS
from benchmarks.harness.results import CPU_FIELDS, CPU_KEY, load, merge
from benchmarks.pages import blocks

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".csv", ".json", ".md", ".svg", ".png", ".txt", ".toml", ".yml"}
#: Files that the documentation names and that a command writes.
WRITTEN_BY_COMMANDS = {"benchmarks/results/gpu.csv"}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("package", [gradsel, gradsel_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_api_pages(package):
    pages = "\n".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    listed = re.findall(rf"^::: {package.__name__}\.(\w+)$", pages, re.MULTILINE)
    assert sorted(listed) == sorted(set(package.__all__) - {"__version__"})


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_links_have_targets(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to #{anchor}, which {path.name} does not have"


@each_page
def test_named_files_exist(page):
    """Paths in backticks are those of the repository, where ``gradsel/`` is short for ``python/gradsel/``."""
    for name in re.findall(r"`([\w.-]+/[\w./-]+)`", page.read_text()):
        if Path(name).suffix in SUFFIXES and name not in WRITTEN_BY_COMMANDS:
            assert any((place / name).exists() for place in (ROOT, ROOT / "python")), f"{page.name} names {name}"


def test_generated_blocks_hold_the_figures_of_the_results():
    used = []
    for page in blocks.pages():
        text = page.read_text()
        used += blocks.names(text)
        assert text == blocks.generated(text), f"{page.relative_to(ROOT)}: run python -m benchmarks.draw"
        assert text.count("<!-- generated") == text.count("<!-- end -->") == len(blocks.names(text))
    assert set(used) == set(blocks.BLOCKS)


def test_generated_blocks_follow_the_results(tmp_path):
    """Other times and another processor give other figures, and a missing row is named."""
    for path in RESULTS.glob("*-cpu.csv"):
        shutil.copy(path, tmp_path)
    rows = load(RESULTS / "cpu.csv")
    for row in rows:
        row.update(device="Another CPU", threads="1", p50_us=str(3 * float(row["p50_us"])))
    merge(tmp_path / "cpu.csv", CPU_FIELDS, CPU_KEY, rows)
    assert "Another CPU, 1 thread," in blocks.BLOCKS["strategies"](tmp_path)
    for name, block in blocks.BLOCKS.items():
        assert (block(tmp_path) != block(RESULTS)) == (
            name
            in {"measured", "operators", "operator findings", "ranking", "strategies", "shared inputs", "task times"}
        )
    (tmp_path / "cpu.csv").unlink()
    merge(tmp_path / "cpu.csv", CPU_FIELDS, CPU_KEY, [row for row in rows if row["kernel"] != "ranking"])
    with pytest.raises(ValueError, match=r"ranking.*make bench"):
        blocks.BLOCKS["ranking"](tmp_path)
