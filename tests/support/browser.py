"""A real browser for tests of pages: Chromium, without network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.harness import browser


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = browser.chromium(playwright)
        if found is None:
            pytest.skip("no Chromium: install it by apt-get install chromium, or by playwright install chromium")
        opened = playwright.chromium.launch(executable_path=found)
        yield opened
        opened.close()
