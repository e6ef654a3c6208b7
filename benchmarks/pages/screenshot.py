"""The picture of a report for the README: ``python -m benchmarks.pages.screenshot demo-output/run``."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from benchmarks.harness import browser

PICTURE = Path(__file__).parents[2] / "docs" / "demo" / "report.png"
#: CSS pixels: the width of the window, and how much of the page is shown.
WIDTH, HEIGHT = 1200, 770


def screenshot(report: Path, picture: Path = PICTURE) -> None:
    """Opens the page and writes its upper part as a PNG with few colours."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = browser.chromium(playwright)
        if found is None:
            raise SystemExit("no Chromium: install it by apt-get install chromium, or by playwright install chromium")
        opened = playwright.chromium.launch(executable_path=found)
        page = opened.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light", device_scale_factor=1.5
        )
        page.goto(report.resolve().as_uri())
        taken = page.screenshot()
        opened.close()
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a folder that gradsel finetune wrote")
    screenshot(parser.parse_args().run / "report.html")
    print(PICTURE)
