"""The browser that opens reports: for their picture in the documentation, and for the tests."""

from __future__ import annotations

import os
import shutil
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium(playwright: Any) -> str | None:
    """A Chromium on the path, or else the one that ``playwright install chromium`` has fetched; None: there is none."""
    own: str = playwright.chromium.executable_path
    return next(filter(None, map(shutil.which, NAMES)), own if os.path.exists(own) else None)
