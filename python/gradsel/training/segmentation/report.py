"""report.html of a segmentation: the page of all tasks, with predictions beside the truth."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from torch import Tensor

from gradsel.selection.selection import Selection
from gradsel.training.config import Config
from gradsel.training.datasets import open_image
from gradsel.training.page import Tile, write_page
from gradsel.training.segmentation.data import read_mask
from gradsel.training.segmentation.model import resized
from gradsel.training.splits import Data, Split

#: Images shown of the worst and of the best, and their longest side in pixels.
_SHOWN, _SIDE = 6, 256
_TRUTH, _GUESS = (46, 160, 96), (214, 110, 32)


class Example(NamedTuple):
    """A test image.

    Attributes:
        name: its file.
        dice: in percent.
        pictures: data URIs of the image, and of it with its true and its predicted mask, each with what it is.
    """

    name: str
    dice: float
    pictures: list[tuple[str, str]]


def write_report(
    folder: Path, config: Config, results: dict[str, Any], data: Data, logits: Tensor, selection: Selection | None
) -> None:
    """Writes report.html: metrics, curves, predictions beside the truth, where the trained weights lie, cost, settings.

    Args:
        results: what results.json will say.
        logits: of the masks of the test set, [samples, height, width].
        selection: what was trained, if it was not everything.
    """
    metrics = results["metrics"]
    dice = [math.nan if value is None else value for value in metrics["per_image"]["dice"]]
    order = sorted((n for n, value in enumerate(dice) if not math.isnan(value)), key=dice.__getitem__)
    half = (len(order) + 1) // 2
    worst, best = (
        [_example(data.splits["test"], number, dice[number], logits) for number in numbers[:_SHOWN]]
        for numbers in (order[:half], order[half:][::-1])
    )
    write_page(
        "segmentation.html.jinja", folder, config, results, selection,
        lead=", ".join(f"{count:,} {name}" for name, count in results["samples"].items()) + " images with masks.",
        tiles=[
            Tile("mDice", f"{metrics['mdice']:.1f} %", f"of {metrics['samples']:,} test images"),
            Tile("mIoU", f"{metrics['miou']:.1f} %", "mean over images"),
        ],
        metric=("eval_mdice", "mean Dice", "mDice on validation, %"),
        worst=worst,
        best=best,
    )  # fmt: skip


def _example(split: Split, number: int, dice: float, logits: Tensor) -> Example:
    image, truth = open_image(split.inputs[number]), read_mask(split.labels[number]).numpy() > 0
    guess = (resized(logits[number : number + 1], (image.height, image.width)).squeeze(0) > 0).numpy()
    pixels = numpy.asarray(image)
    shown = {"image": pixels, "truth": _overlaid(pixels, truth, _TRUTH), "prediction": _overlaid(pixels, guess, _GUESS)}
    name = Path(split.inputs[number]).name
    return Example(name, 100 * dice, [(what, _uri(each)) for what, each in shown.items()])


def _overlaid(pixels: numpy.ndarray, mask: numpy.ndarray, colour: tuple[int, int, int]) -> numpy.ndarray:
    """Half the colour over the mask."""
    return numpy.where(mask[..., None], (pixels.astype(numpy.uint16) + colour) // 2, pixels).astype(numpy.uint8)


def _uri(pixels: numpy.ndarray) -> str:
    from PIL import Image

    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE))
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
