"""What selections and features are like: distribution, overlap, t-SNE."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradsel.attached import is_attached
from gradsel.errors import RunError
from gradsel.experiments.working import run_or_continue
from gradsel.methods import Context, method
from gradsel.methods.base import SELECTION
from gradsel.nn.detaching import detach
from gradsel.ranking.pooling import features
from gradsel.selection.selection import Selection
from gradsel.training.config import Config
from gradsel.training.datasets import SelectionBatches
from gradsel.training.evaluation import predictions
from gradsel.training.folder import read_json, write_text
from gradsel.training.models import Loaded
from gradsel.training.parts import device_of
from gradsel.training.tasks import task_of
from gradsel.training.using import loaded_result

#: The most samples that t-SNE takes.
_SAMPLES = 5_000


@dataclass(frozen=True)
class Measured:
    """What one run says.

    Attributes:
        values: numbers by name.
        results: what ``results.json`` of a run says, where there is one.
    """

    values: dict[str, float]
    results: dict[str, Any]


def batches_of(config: Config) -> tuple[Loaded, SelectionBatches, bool]:
    """The pre-trained model on its device, batches to rank on, and whether samples have two views."""
    task, device = task_of(config), device_of(config)
    data = task.read(config)
    loaded = task.load(config, data.classes, data.kind)
    loaded.model.to(device).eval()
    _, ranking, views = task.datasets(data.splits, loaded, config)
    batches = SelectionBatches(
        ranking, config.recipe.batch_size, task.collate(loaded), device, config.seed, config.data.workers, not views
    )
    return loaded, batches, views


def selection_of(config: Config, folder: Path) -> Selection:
    """The selection that a run would train, which is kept in the folder."""
    path = folder / SELECTION
    if path.is_file():
        return Selection.load(path)
    loaded, batches, views = batches_of(config)
    how = method(config.method.name, **config.method.options)
    context = Context(head=loaded.head, parts=loaded.parts, seed=config.seed, views=views, progress=False)
    prepared = how.prepare(loaded.model, batches if how.needs_batches else None, context)
    if prepared.selection is None:
        raise RunError(f"method.name: {how.name} selects nothing")
    prepared.selection.save(path)
    return prepared.selection


def chosen(config: Config, folder: Path) -> Measured:
    """Makes a selection, for :func:`overlap`."""
    return Measured({"entries": float(selection_of(config, folder).trainable_count())}, {})


def distribution(config: Config, folder: Path) -> Measured:
    """How the selected entries are distributed over the blocks, in percent (GPS, section 6.3)."""
    shares = selection_of(config, folder).by_block().shares()
    names = dict.fromkeys(block for by_block in shares.values() for block in by_block)
    blocks = {block: 100 * sum(by_block.get(block, 0.0) for by_block in shares.values()) for block in names}
    inside = [share for block, share in blocks.items() if block]
    values = {
        "first half": sum(inside[: len(inside) // 2]),
        "last two blocks": sum(inside[-2:]),
        "largest block": max(inside),
        **{f"block {block or 'none'}": share for block, share in blocks.items()},
    }
    return Measured(values, {})


def overlap(folders: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """How much of each task's selected weights others select, in percent (GPS, section 8.2).

    Returns:
        By data set, ``shared`` with all others on average, and with each; what is trained whole does not count.
    """
    selections = {}
    for name, folder in folders.items():
        masks = Selection.load(folder / SELECTION)
        selections[name] = Selection({path: mask for path, mask in masks.items() if not mask.is_whole})  # heads differ
    found: dict[str, dict[str, float]] = {}
    for name, own in selections.items():
        shares = {
            f"shared with {other}": 100 * own.overlap(theirs).share
            for other, theirs in selections.items()
            if other != name
        }
        if shares:
            found[name] = {"shared": statistics.fmean(shares.values()), **shares}
    return found


# --- Features ----------------------------------------------------------------------------------------------------


def tsne(config: Config, folder: Path) -> Measured:
    """Fine-tunes, and puts the features of the test set in two dimensions (GPS, section 8.3).

    Writes ``tsne.json`` (points [samples, 2] and labels) and ``tsne.png``.

    Returns:
        The accuracy, and silhouettes of the classes: of the features, and of the points.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    results = run_or_continue(config)
    run = Path(config.output.folder)
    task = task_of(config)
    data = task.read(config)
    model, loaded, device = loaded_result(run, config, read_json(run / "labels.json"), data.kind)
    if is_attached(model):
        detach(model)
    pooled = features(model)

    def outputs(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        found: Tensor = pooled(network, inputs)
        return found

    testing = task.testing(data.splits["test"], loaded, config)
    found, labels = predictions(
        model, testing, task.collate(loaded), batch_size=config.recipe.batch_size, device=device, outputs=outputs
    )
    step = -(-len(labels) // _SAMPLES)
    found, labels = found.flatten(1)[::step], labels[::step]
    perplexity = min(30.0, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=config.seed, init="pca").fit_transform(found.numpy())
    write_text(folder / "tsne.json", json.dumps({"points": points.tolist(), "labels": labels.tolist()}) + "\n")
    _draw(folder / "tsne.png", points, labels.tolist())
    values = {"top1": results["metrics"]["top1"]}
    if 1 < len(labels.unique()) < len(labels):
        values["silhouette"] = float(silhouette_score(found.numpy(), labels.numpy()))
        values["silhouette in 2-D"] = float(silhouette_score(points, labels.numpy()))
    return Measured(values, results)


def _draw(path: Path, points: Any, labels: list[int]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter(points[:, 0], points[:, 1], c=labels, cmap="hsv", s=6)
    axes.set_axis_off()
    figure.savefig(path, dpi=120)
