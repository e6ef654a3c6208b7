"""What mkdocs does beyond the pages in docs/: pages and pictures from elsewhere in the repository, and docstrings.

Links are written so that they work where the files lie. Here they are rewritten to where the site has the files.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Files at the root of the repository, and what the site calls them.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
PLAIN = ("LICENSE", "CITATION.cff")
RESULTS = "benchmarks/results"
#: Cells of the support matrix, and their classes in site.css.
OUTCOMES = {"works": "works", "refused": "refused", "in part": "part", "not run": "nothing", "untested": "nothing"}
#: A role of a docstring in HTML, ``:func:<code>name</code>``; after ``~`` only the last part of the name is shown.
ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):<code>(?:~(?:\w+\.)*)?")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=_from_root((ROOT / source).read_text())))
    for name in PLAIN:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    for path in sorted((ROOT / RESULTS).iterdir()):
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri in PAGES.values():
        return markdown
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    html = ROLE.sub("<code>", html)
    if page.file.src_uri == "support.md":
        for outcome, name in OUTCOMES.items():
            html = html.replace(f"<td>{outcome}</td>", f'<td class="{name}">{outcome}</td>')
    return html


def _from_root(markdown: str) -> str:
    return markdown.replace("](docs/", "](").replace("](README.md", "](index.md")
