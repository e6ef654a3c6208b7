"""What the reports of all tasks share: header, training, trained weights, cost, settings, and the style of the page."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradsel_kernels
from gradsel.selection.selection import Selection
from gradsel.tables import grouped, shape_text
from gradsel.training import costs, pictures
from gradsel.training.config import Config
from gradsel.training.folder import write_text


class Tile(NamedTuple):
    """A number at the top of the page, with what it is and a note below it."""

    name: str
    value: str
    note: str


def write_page(
    template: str, folder: Path, config: Config, results: dict[str, Any], selection: Selection | None, *,
    lead: str, tiles: Sequence[Tile], metric: tuple[str, str, str], **values: Any,
) -> None:  # fmt: skip
    """Writes report.html: a page without scripts that needs no network, in light and dark.

    Args:
        template: one of ``templates/``, which extends ``page.html.jinja`` by the sections of its task.
        results: what results.json will say.
        selection: what was trained, if it was not everything.
        lead: a sentence about the data.
        tiles: the task's own; those about cost are added.
        metric: chooses the best epoch: its entry in the history, its name in a sentence, the label of its axis.
        **values: what the template needs besides.
    """
    seconds = results["seconds"]
    own = [
        Tile("Trained", f"{results['share']:.3g} %", "of the parameters"),
        Tile("Size of the result", costs.size(results["bytes"]),
             f"the whole model: {costs.size(results['bytes_of_full_model'])}"),
        Tile("Time", costs.duration(seconds["selection"] + seconds["training"]),
             f"{results['steps']:,} steps on {results['device']}"),
    ]  # fmt: skip
    page = _render(
        template,
        title=f"{_last_part(config.model.name)} on {config.data.name}",
        config=config,
        results=results,
        lead=lead,
        method=_method_text(results["method"]),
        tiles=[*tiles, *own],
        metric=metric[1],
        curves=_curves(results["history"], *metric),
        distribution=None if selection is None else pictures.distribution(selection),
        places=None if selection is None else pictures.places(selection),
        selected=None if selection is None else _selected(selection),
        selection_time=costs.duration(seconds["selection"]) if seconds["selection"] >= costs.SHORTEST else None,
        notes={} if selection is None else selection.notes,
        costs=costs.table(results, selection),
        folder=folder,
        shell=lambda path: shlex.quote(str(path)),
        version=gradsel_kernels.__version__,
        **values,
    )
    write_text(folder / "report.html", page)


def _render(template: str, **values: Any) -> str:
    """A page from its template, with everything escaped but the pictures."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradsel.training"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals["picture"] = _picture
    text: str = environment.get_template(template).render(**values)
    return text


def _picture(svg: str, alt: str, large: bool = False) -> str:
    """An element that matplotlib has drawn, whose texts it has escaped, with the same in words.

    Args:
        large: it keeps a size at which its text can be read, and scrolls where the page is narrower.
    """
    from markupsafe import Markup

    found = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    assert found is not None
    width = float(found[1])
    style = f"min-width: {1.2 * width:.0f}px; max-width: {1.6 * width:.0f}px" if large else ""
    opening = Markup('<svg role="img" aria-label="{}" style="{}"').format(alt, style)
    return opening + Markup(svg.removeprefix("<svg"))


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _method_text(method: dict[str, Any]) -> str:
    options = [f"{name} {value}" for name, value in method.items() if name != "name" and value is not None]
    return method["name"] + (f" ({', '.join(options)})" if options else "")


def _curves(history: Sequence[dict[str, Any]], key: str, name: str, label: str) -> list[tuple[str, str]]:
    """The pictures of training, each with what it says in words."""

    def points(entry_name: str) -> list[tuple[float, float]]:
        return [(entry["epoch"], entry[entry_name]) for entry in history if entry_name in entry]

    drawn = []
    losses = {"training": points("loss"), "validation": points("eval_loss")}
    if picture := pictures.curve("loss", losses, "loss"):
        ends = [f"{what} from {seen[0][1]:.3g} to {seen[-1][1]:.3g}" for what, seen in losses.items() if seen]
        drawn.append((picture, f"Loss by epoch: {', '.join(ends)}"))
    scores = points(key)
    if picture := pictures.curve("metric", {"validation": scores}, label):
        best = max(score for _, score in scores)
        drawn.append((picture, f"{name[0].upper()}{name[1:]} on the validation set by epoch, at best {best:.1f} %"))
    rates = points("learning_rate")
    if picture := pictures.curve("rate", {"learning rate": rates}, "learning rate"):
        drawn.append((picture, f"Learning rate by epoch, at most {max(rate for _, rate in rates):.2g}"))
    return drawn


class Row(NamedTuple):
    """Parameters that are trained alike, those of all blocks together.

    Attributes:
        name: with ``*`` for the numbers of blocks.
        tensors: how many they are.
        shape: of each.
        trained: trained scalars, of all together.
        share: the same as a fraction.
        how: the kind of mask, or why it is frozen.
    """

    name: str
    tensors: int
    shape: str
    trained: int
    share: float
    how: str


def _selected(selection: Selection) -> list[Row]:
    """The selection by parameter."""
    groups = grouped((name, (mask.shape, mask.label, mask.nnz)) for name, mask in selection.items())
    return [
        Row(name.partition("  x")[0], count, shape_text(shape), nnz * count, nnz / max(math.prod(shape), 1), label)
        for name, (shape, label, nnz), count in groups
    ]
