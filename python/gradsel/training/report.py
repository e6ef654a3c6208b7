"""report.html of a classification: confusion matrix, classes, and examples right and wrong."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gradsel.selection.selection import Selection
from gradsel.training import pictures
from gradsel.training.config import Config
from gradsel.training.data import Data
from gradsel.training.datasets import open_image
from gradsel.training.glue import metric_of
from gradsel.training.page import Tile, write_page
from gradsel.training.splits import Stored

#: Examples right and wrong that are shown of each.
_EXAMPLES = 8
#: What chooses the best epoch, in a sentence, and as the label of an axis.
_METRICS = {
    "top1": ("accuracy", "top-1 on validation, %"),
    "accuracy": ("accuracy", "accuracy on validation, %"),
    "f1": ("F1", "F1 on validation, %"),
    "matthews": ("Matthews correlation", "Matthews correlation on validation, %"),
}
#: Characters of a text that are shown.
_EXCERPT = 280
#: Classes up to which all of them are listed.
_CLASSES = 15
#: Pairs of classes that are listed as confused.
_PAIRS = 5
#: Longest side of an example's picture, in pixels, and the side below which its pixels are shown as squares.
_THUMBNAIL, _COARSE = 192, 64


class Example(NamedTuple):
    """A test sample with what the model says about it.

    Attributes:
        image: a data URI, or None for texts.
        texts: one or two texts, shortened.
        coarse: the image has so few pixels that they should be seen.
    """

    said: str
    truth: str
    right: bool
    percent: float
    image: str | None
    texts: list[str]
    coarse: bool

    @property
    def alt(self) -> str:
        """The example in words."""
        verdict = "which is right" if self.right else f"but it is {self.truth}"
        return f"Test image; predicted {self.said} with {self.percent:.0f} %, {verdict}"


def write_report(
    folder: Path, config: Config, results: dict[str, Any], data: Data, logits: Tensor, labels: Tensor,
    selection: Selection | None,
) -> None:  # fmt: skip
    """Writes report.html: metrics, curves, confusion matrix, examples, where the trained weights lie, cost, settings.

    Args:
        results: what results.json will say.
        logits: [samples, classes] of the test set.
        labels: [samples].
        selection: what was trained, if it was not everything.
    """
    metrics, metric = results["metrics"], metric_of(config.data.task)
    split = ", ".join(f"{count:,} {name}" for name, count in results["samples"].items())
    five = f"; top-5 {metrics['top5']:.1f} %" if "top5" in metrics else ""
    write_page(
        "classification.html.jinja", folder, config, results, selection,
        lead=f"{results['classes']} classes, {split} samples.",
        tiles=[
            Tile("Top-1 accuracy", f"{metrics['top1']:.1f} %", f"of {metrics['samples']:,} test samples{five}"),
            Tile("F1, macro average", f"{metrics['f1']:.1f} %", f"Matthews correlation {metrics['matthews']:.3f}"),
        ],
        metric=(f"eval_{metric}", *_METRICS[metric]),
        metrics=metrics,
        confusion=pictures.confusion(metrics["confusion"], data.classes),
        confusion_alt=_confusion_text(metrics, data.classes),
        confusion_named=len(data.classes) <= pictures.NAMED,
        confusion_large=len(data.classes) > pictures.NUMBERED,
        shown_classes=_shown_classes(metrics["per_class"]),
        confused=_most_confused(metrics["confusion"], data.classes),
        wrong=_examples(data, logits, labels, right=False),
        right=_examples(data, logits, labels, right=True),
    )  # fmt: skip


def _confusion_text(metrics: dict[str, Any], classes: Sequence[str]) -> str:
    """The confusion matrix in words."""
    right = sum(row[number] for number, row in enumerate(metrics["confusion"]))
    return (
        f"Confusion matrix of {len(classes)} classes: {right:,} of {metrics['samples']:,} samples are on the diagonal"
    )


def _shown_classes(per_class: dict[str, dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    """All classes in their order, or, where there are many, the worst ones, the worst first."""
    if len(per_class) <= _CLASSES:
        return list(per_class.items())
    return sorted(per_class.items(), key=lambda item: item[1]["f1"])[:_CLASSES]


def _most_confused(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> list[tuple[int, str, str]]:
    """How often, which class, and what it was taken for."""
    pairs = [
        (count, classes[row], classes[column])
        for row, of_class in enumerate(counts)
        for column, count in enumerate(of_class)
        if row != column and count
    ]
    return sorted(pairs, key=lambda pair: -pair[0])[:_PAIRS]


def _examples(data: Data, logits: Tensor, labels: Tensor, right: bool) -> list[Example]:
    """The test samples that the model is most certain of among those right or wrong, first one of each class."""
    confidence, guess = logits.softmax(1).max(1)
    order = confidence.argsort(descending=True, stable=True).tolist()
    order = [number for number in order if bool(guess[number] == labels[number]) is right]
    seen: Counter[int] = Counter()
    place = {}
    for number in order:
        place[number] = seen[int(guess[number])]
        seen[int(guess[number])] += 1
    chosen = sorted(order, key=place.__getitem__)[:_EXAMPLES]
    found = []
    for number in chosen:
        given = data.splits["test"].inputs[number]
        image, coarse = _thumbnail(given) if data.kind == "images" else (None, False)
        found.append(
            Example(
                said=data.classes[int(guess[number])],
                truth=data.classes[int(labels[number])],
                right=right,
                percent=100 * float(confidence[number]),
                image=image,
                texts=[] if data.kind == "images" else [_excerpt(text) for text in given],
                coarse=coarse,
            )
        )
    return found


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else text[:_EXCERPT].rsplit(" ", 1)[0] + " …"


def _thumbnail(image: str | Stored) -> tuple[str, bool]:
    small = open_image(image)
    coarse = max(small.size) < _COARSE
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    kind = "PNG" if coarse else "JPEG"
    small.save(buffer, kind, **({} if coarse else {"quality": 85}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}", coarse
