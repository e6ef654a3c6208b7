"""report.html: one file with pictures inside, without scripts, in light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from gradsel.selection.selection import Selection
from gradsel.training.config import Config
from gradsel.training.data import Data
from gradsel.training.folder import write_text

#: Examples right and wrong that are shown of each.
_EXAMPLES = 8
#: Classes up to which the confusion matrix has names.
_NAMED = 30
_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; }
figure { margin: 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.examples { display: flex; flex-wrap: wrap; gap: .75rem; } .examples figure { width: 7rem; overflow-wrap: anywhere; }
.examples img { width: 7rem; height: 7rem; object-fit: cover; } figcaption { font-size: .8rem; }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: .75rem; font-size: .85rem; }
"""


def write_report(
    folder: Path, config: Config, results: dict[str, Any], data: Data, logits: Tensor, labels: Tensor,
    selection: Selection | None,
) -> None:  # fmt: skip
    """Writes report.html: metrics, curves, confusion matrix, examples, where the trained weights lie, the settings."""
    title = f"{config.model.name}, fine-tuned on {Path(config.data.path).name}"
    parts = [_section("Result", _table(_facts(results)))]
    parts.append(_section("Training", _picture(_curves(results["history"]), "Loss and learning rate by epoch")))
    parts.append(_section("Confusion", _picture(_confusion(results["metrics"]["confusion"], data.classes),
                                                "Test samples by class (row) and prediction (column)")))  # fmt: skip
    parts.append(_section("Classes", _per_class(results["metrics"]["per_class"])))
    for name, right in (("Wrong", False), ("Right", True)):
        parts.append(_section(f"{name}, with the most confidence", _examples(data, logits, labels, right)))
    if selection is not None:
        figure = _picture(_distribution(selection), "The selected weights by block and type of matrix")
        parts.append(_section("Where the trained weights lie", figure))
    parts.append(_section("Settings", f"<pre>{html.escape(config.to_yaml())}</pre>"))
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
    )
    body = f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts)
    page = (
        f"<!doctype html>\n<html lang='en'><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    write_text(folder / "report.html", page)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}\n</section>" if content else ""


def _table(rows: Sequence[Sequence[Any]], heads: Sequence[str] = ()) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + (line(heads, "th") if heads else "") + "".join(line(row, "td") for row in rows) + "</table>"


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    metrics, seconds = results["metrics"], results["seconds"]
    rows = [("top-1", f"{metrics['top1']:.2f} %")]
    if "top5" in metrics:
        rows.append(("top-5", f"{metrics['top5']:.2f} %"))
    rows += [
        ("F1, macro average", f"{metrics['f1']:.2f} %"),
        ("Matthews correlation", f"{metrics['matthews']:.3f}"),
        ("test samples", f"{metrics['samples']:,}"),
        ("method", ", ".join(f"{k} {v}" for k, v in results["method"].items() if v is not None).removeprefix("name ")),
        ("trained", f"{results['trained']:,} of {results['parameters']:,} parameters ({results['share']:.3f} %)"),
        ("result", f"{results['bytes']:,} bytes; the whole model has {results['bytes_of_full_model']:,}"),
        ("selection", f"{seconds['selection']:.1f} s"),
        ("training", f"{seconds['training']:.1f} s for {results['steps']:,} steps, on {results['device']}"),
    ]
    if results["peak_memory_bytes"]:
        rows.append(("peak memory", f"{results['peak_memory_bytes'] / 1e9:.2f} GB"))
    return rows


def _picture(figure: Any, caption: str) -> str:
    if figure is None:
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return f"<figure>{_image(buffer.getvalue(), caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _image(png: bytes, text: str) -> str:
    return f"<img alt='{html.escape(text, quote=True)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _curves(history: Sequence[dict[str, Any]]) -> Any:
    figure, (losses, rates) = _figure(8, 3, 2)
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
        if points:
            losses.plot(*zip(*points, strict=True), marker=".", label=label)
    points = [(entry["epoch"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    if not points:
        return None
    rates.plot(*zip(*points, strict=True), marker=".")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    rates.set(xlabel="epoch", ylabel="learning rate")
    figure.tight_layout()
    return figure


def _confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Any:
    matrix = numpy.array(counts, dtype=float)
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    side = min(max(3.0, 0.35 * len(classes)), 9.0)
    figure, (axis,) = _figure(side, side)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= _NAMED:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
        if len(classes) <= _NAMED // 2:
            for row, column in numpy.argwhere(matrix > 0):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, int(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axis.set(xlabel="predicted", ylabel="class")
    return figure


def _per_class(per_class: dict[str, dict[str, float]]) -> str:
    rows = [
        (name, *(f"{100 * values[key]:.1f} %" for key in ("precision", "recall", "f1")), f"{values['samples']:,}")
        for name, values in per_class.items()
    ]
    return _table(rows, ("class", "precision", "recall", "F1", "samples"))


def _examples(data: Data, logits: Tensor, labels: Tensor, right: bool) -> str:
    confidence, guess = logits.softmax(1).max(1)
    numbers = [int(n) for n in confidence.argsort(descending=True) if bool(guess[n] == labels[n]) is right]
    inputs, figures, rows = data.splits["test"].inputs, [], []
    for number in numbers[:_EXAMPLES]:
        truth, said = data.classes[int(labels[number])], data.classes[int(guess[number])]
        told = f"{said}, {100 * float(confidence[number]):.0f} %" + ("" if right else f" (is {truth})")
        if data.kind == "images":
            picture = _image(_thumbnail(inputs[number]), told)
            figures.append(f"<figure>{picture}<figcaption>{html.escape(told)}</figcaption></figure>")
        else:
            rows.append((" | ".join(inputs[number])[:300], told))
    if rows:
        return _table(rows)
    return f"<div class='examples'>{''.join(figures)}</div>" if figures else "none"


def _thumbnail(path: str) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((160, 160))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def _distribution(selection: Selection) -> Any:
    """The trained entries that were ranked, by block, stacked by type of matrix: the papers' distribution plot."""
    shares = selection.by_block().shares()
    if not shares:
        return None
    names = list(next(iter(shares.values())))
    figure, (axis,) = _figure(8, 3.5)
    bottom = numpy.zeros(len(names))
    for kind, by_block in shares.items():
        heights = 100 * numpy.array(list(by_block.values()))
        axis.bar(range(len(names)), heights, bottom=bottom, label=kind)
        bottom += heights
    axis.set_xticks(range(len(names)), [name or "outside blocks" for name in names], rotation=90)
    axis.set(ylabel="share of the selected weights, %")
    axis.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure
