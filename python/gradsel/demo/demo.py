"""``gradsel demo``: GPS on real images in about a minute, on a CPU and without a download.

A small vision transformer learns the handwritten digits 0 to 4 and is then adapted to 5 to 9 from ten examples of each,
by six methods. :func:`adapt` and :func:`gradsel.demo.methods.attached` show fine-tuning with this library.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import gradsel
from gradsel.delta.delta import Delta, save_delta
from gradsel.delta.exporting import export
from gradsel.demo import plots
from gradsel.demo.data import NEW, OLD, REPORTED, TUNING, Split, split
from gradsel.demo.methods import BATCH, METHODS, RATES, SAVED, Method
from gradsel.demo.training import accuracy, fine_tune
from gradsel.papers.vit import VisionTransformer


@dataclass(frozen=True)
class Settings:
    """Sizes of the network and of the runs; the learning rates in :data:`METHODS` were chosen for these defaults."""

    dim: int = 64
    depth: int = 4
    heads: int = 4
    pretrain_epochs: int = 80
    pretrain_rate: float = 2e-3
    shots: int = 10
    epochs: int = 100


def pretrain(settings: Settings, quiet: bool) -> tuple[VisionTransformer, float]:
    """A network trained on the old classes, and its accuracy on held-out images of them."""
    torch.manual_seed(0)
    data = split(OLD, 0.85, slice(0, 100))
    model = VisionTransformer(8, 2, 1, settings.dim, settings.depth, settings.heads, num_classes=len(OLD))
    fine_tune(
        model, torch.optim.Adam(model.parameters(), fused=True), data.images, data.labels,
        epochs=settings.pretrain_epochs, lr=settings.pretrain_rate, batch_size=64,
        progress=None if quiet else "pre-training",
    )  # fmt: skip
    return model, accuracy(model, data.test_images, data.test_labels)


@dataclass
class Outcome:
    """The accuracy and the cost of one adaptation."""

    accuracy: float
    trained: int
    parameters: int
    state_bytes: int
    delta_bytes: int
    step_ms: float
    used_columns: dict[str, float]
    distribution: dict[str, dict[str, float]]


def adapt(
    pretrained: VisionTransformer,
    method: Method,
    data: Split,
    seed: int,
    *,
    epochs: int,
    rate: float | None = None,
    title: str | None = None,
) -> tuple[nn.Module, Outcome]:
    """Fine-tunes a copy of ``pretrained`` on ``data``; ``rate`` overrides the method's learning rate."""
    model = fresh(pretrained, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    task = method.start(model, data, seed)
    history = fine_tune(
        task.model, task.optimizer, data.images, data.labels,
        epochs=epochs, lr=rate or method.rate, batch_size=BATCH, seed=seed, progress=title,
    )  # fmt: skip
    return task.model, Outcome(
        accuracy=accuracy(task.model, data.test_images, data.test_labels),
        trained=task.trained,
        parameters=parameters,
        state_bytes=gradsel.state_bytes(task.optimizer),
        delta_bytes=task.delta_bytes,
        step_ms=1000 * statistics.median(history.seconds),
        used_columns={} if task.selection is None else used_columns(task.selection),
        distribution={} if task.selection is None else task.selection.by_block().shares(),
    )


def fresh(pretrained: VisionTransformer, seed: int) -> VisionTransformer:
    """A copy with a new head, with which an adaptation begins."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    model.reset_classifier(len(NEW))
    return model


def used_columns(selection: gradsel.Selection) -> dict[str, float]:
    """The percentage of inputs that any neuron has selected, for each matrix with K weights per neuron."""
    return {
        name: 100 * mask.used_columns().numel() / math.prod(mask.shape[1:])
        for name, mask in selection.items()
        if mask.kind == "per-row"
    }


@dataclass
class MethodRuns:
    """One method over all seeds."""

    method: str
    rate: float
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        return [outcome.accuracy for outcome in self.outcomes]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def std(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.outcomes) > 1 else 0.0

    @property
    def trained_percent(self) -> float:
        return 100 * self.outcomes[0].trained / self.outcomes[0].parameters

    @property
    def step_ms(self) -> float:
        return statistics.median(outcome.step_ms for outcome in self.outcomes)

    def used_columns(self) -> dict[str, float]:
        """The percentages of :func:`used_columns`, averaged over the seeds."""
        return {
            name: statistics.mean(outcome.used_columns[name] for outcome in self.outcomes)
            for name in self.outcomes[0].used_columns
        }


@dataclass
class SavedDelta:
    """File sizes of one adapted network, restored bit for bit from either file."""

    method: str
    delta_bytes: int
    checkpoint_bytes: int


@dataclass
class Results:
    """Everything that the table, the picture and the JSON file show."""

    settings: Settings
    seeds: list[int]
    pretrained_accuracy: float
    test_images: int
    rows: list[MethodRuns]
    delta: SavedDelta | None = None


def run(
    seeds: Sequence[int] = (0, 1, 2),
    quiet: bool = False,
    settings: Settings = Settings(),
    methods: Sequence[Method] = METHODS,
) -> Results:
    """Pre-trains once, then adapts with every method and seed. Seeds draw examples, head, order and augmentation."""
    with _one_thread():
        pretrained, reached = pretrain(settings, quiet)
        runs = [MethodRuns(method.name, method.rate) for method in methods]
        results = Results(settings, list(seeds), reached, 0, runs)
        for seed in seeds:
            data = split(NEW, settings.shots, REPORTED, seed)
            results.test_images = len(data.test_labels)
            for method, row in zip(methods, results.rows, strict=True):
                title = None if quiet else f"seed {seed}, {method.name}"
                model, outcome = adapt(pretrained, method, data, seed, epochs=settings.epochs, title=title)
                row.outcomes.append(outcome)
                if method.name == SAVED and results.delta is None:
                    results.delta = SavedDelta(SAVED, *saved_bytes(model, fresh(pretrained, seed)))
        return results


def saved_bytes(model: nn.Module, base: nn.Module) -> tuple[int, int]:
    """Saves the delta of an attached network and a full checkpoint, and checks both; the sizes of the files in bytes.

    Args:
        model: the network, which does not change.
        base: the network before training. The delta is applied to it and reverted.

    Raises:
        RuntimeError: a file did not restore the network bit for bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        small, full = Path(folder) / "task.delta", Path(folder) / "model.safetensors"
        export(model, full)
        saved = save_delta(model, small)
        before = copy.deepcopy(base.state_dict())
        with Delta.load(small).applied(base):
            tuned = load_file(full)
            exact = all(torch.equal(tensor, tuned[name]) for name, tensor in base.state_dict().items())
        exact &= all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        if not exact or Delta.load(small) != saved:
            raise RuntimeError("the saved delta did not come back to the bit; please report this")
        return small.stat().st_size, full.stat().st_size


def saved_line(saved: SavedDelta) -> str:
    """The result of :func:`saved_bytes` as text."""
    return (
        f"One run of {saved.method}: its file has {saved.delta_bytes:,} bytes, a full checkpoint "
        f"{saved.checkpoint_bytes:,}.\nSaved, applied to the base and reverted: every bit is right."
    )


def tune(
    draws: Sequence[int] = (100, 101, 102),
    settings: Settings = Settings(),
    methods: Sequence[Method] = METHODS,
    rates: Sequence[float] = RATES,
) -> dict[str, dict[float, float]]:
    """The accuracy of every method at each rate: the mean over ``draws`` of the images reserved for tuning."""
    with _one_thread():
        pretrained, _ = pretrain(settings, quiet=False)
        return {
            method.name: {
                rate: statistics.mean(
                    adapt(
                        pretrained, method, split(NEW, settings.shots, TUNING, draw), draw,
                        epochs=settings.epochs, rate=rate, title=f"{method.name}, rate {rate:g}",
                    )[1].accuracy
                    for draw in draws
                )
                for rate in rates
            }
            for method in methods
        }  # fmt: skip


def table(results: Results) -> str:
    """The results as text."""
    parameters = results.rows[0].outcomes[0].parameters
    lines = [
        f"A ViT with {parameters:,} weights, {results.pretrained_accuracy:.1f} % right on digits {OLD[0]}-{OLD[-1]},",
        f"learns {NEW[0]}-{NEW[-1]} from {results.settings.shots} examples of each. "
        f"{results.test_images} test images, {len(results.seeds)} seeds.",
        "",
        f"{'method':<18}{'accuracy %':>13}{'trained %':>11}{'state B':>11}{'difference B':>14}{'ms a step':>11}",
    ]
    for row in results.rows:
        one = row.outcomes[0]
        reached = f"{row.mean:.1f} ± {row.std:.1f}" if len(row.outcomes) > 1 else f"{row.mean:.1f}"
        lines.append(
            f"{row.method:<18}{reached:>13}{row.trained_percent:>11.2f}"
            f"{one.state_bytes:>11,}{one.delta_bytes:>14,}{row.step_ms:>11.1f}"
        )
    lines += [
        "",
        "accuracy: mean and standard deviation over seeds. state: of the optimizer. difference: a file of the",
        "fine-tuned weights. step: median, on one thread; this network is so small that much of it is Python.",
    ]
    return "\n".join(lines)


def save(results: Results, path: Path) -> None:
    """Writes all results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def draw(results: Results, path: Path) -> None:
    """The picture: the accuracy of every method, and how few inputs the selected weights read."""
    colours = {method.name: method.colour for method in METHODS}
    sparse = {row.method: row.used_columns() for row in results.rows if row.outcomes[0].used_columns}
    drawing, (left, right) = plots.figure(2, 13, 5.6)
    plots.accuracies(
        left,
        {row.method: row.accuracies for row in results.rows},
        {row.method: f"{row.trained_percent:.3g} % of the weights" for row in results.rows},
        colours,
    )
    left.set_title(f"Digits {OLD[0]}-{OLD[-1]} to {NEW[0]}-{NEW[-1]}, {results.settings.shots} examples of each")
    plots.used_columns(right, sparse, colours)
    right.set_title("How much of each layer's input the selected weights read")
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(drawing, path)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Matrices this small gain nothing from a second core, and rounding must not depend on the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
