"""Studies on the demo's model and digits: methods side by side, and the ablations of GPS and GRFT.

Every row is a run of ``gradsel finetune``; a variant is the settings in which it differs from the others.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from gradsel.demo import plots
from gradsel.demo.demo import one_thread, prepare
from gradsel.demo.digits import NEW, write_folder
from gradsel.methods.base import SELECTION
from gradsel.selection.selection import Selection
from gradsel.training.config import Config
from gradsel.training.run import finetune

#: Training images of each class, and epochs.
SHOTS, EPOCHS = 20, 30
#: Parts of the images of each class, as slices of percentages: one third chose the learning rates, and only the others
#: count in the tables.
TUNING, REPORTED = slice(0, 33), slice(33, 100)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class Variant(NamedTuple):
    """One row of a table.

    Attributes:
        rate: for GPS, full fine-tuning, LoRA and the linear probe the best of :data:`RATES` according to :func:`tune`,
            which uses images that the tables do not; for all other selections that of GPS.
        method: its name on the command line.
        options: its options.
    """

    name: str
    rate: float
    colour: str
    method: str
    options: Mapping[str, Any] = {}


GPS = Variant("GPS K=1", 3e-2, plots.BLUE, "gps", {"k": 1})
RANDOM = Variant("random K=1", 3e-2, plots.ORANGE, "gps", {"k": 1, "criterion": "random"})

METHODS: Mapping[str, Sequence[Variant]] = {
    "": (
        Variant("linear probe", 3e-2, plots.GREY, "linear"),
        Variant("full fine-tuning", 1e-3, plots.PINK, "full"),
        Variant("LoRA r=8", 3e-3, plots.SKY, "lora", {"rank": 8}),
        RANDOM,
        GPS,
        Variant("GPS K=3", 3e-2, plots.GREEN, "gps", {"k": 3}),
    )
}
ABLATION: Mapping[str, Sequence[Variant]] = {
    "level (gradient, contrastive loss)": (
        Variant("net", 3e-2, plots.SKY, "gps", {"scope": "net"}),
        Variant("layer", 3e-2, plots.SKY, "gps", {"scope": "layer"}),
        GPS,
        Variant("8 columns a matrix", 3e-2, plots.SKY, "gps", {"columns": 8}),
        Variant("rows", 3e-2, plots.SKY, "grft", {"rows": 1}),
        Variant("columns", 3e-2, plots.SKY, "grft", {"columns": 1}),
    ),
    "criterion": (
        Variant("net, random", 3e-2, plots.ORANGE, "gps", {"scope": "net", "criterion": "random"}),
        RANDOM,
        Variant("magnitude", 3e-2, plots.ORANGE, "gps", {"criterion": "magnitude"}),
    ),
    "loss": (Variant("head + CE", 3e-2, plots.GREEN, "gps", {"loss": "cross-entropy"}),),
    "pull to the pre-trained weights": (
        Variant("K=1 + L2", 3e-2, plots.PINK, "grft", {"sparse": 1, "anchor": 1e-3}),
        Variant("rows + L2: GRFT", 3e-2, plots.PINK, "grft", {"rows": 1, "anchor": 1e-3}),
        Variant("columns + L2: GRFT", 3e-2, plots.PINK, "grft", {"columns": 1, "anchor": 1e-3}),
    ),
}
STUDIES = {"methods": METHODS, "ablation": ABLATION}


@dataclass
class Runs:
    """One variant over all seeds.

    Attributes:
        accuracies: top-1 in percent, by seed.
        trained, parameters: numbers of scalars.
        bytes: of the result on disk.
        used_columns: for each matrix with K weights per neuron, the percentage of its inputs that any neuron reads, in
            the first run.
        distribution: of the selected weights over blocks and types, in the first run.
    """

    variant: str
    method: str
    options: dict[str, Any]
    rate: float
    accuracies: list[float] = field(default_factory=list)
    trained: int = 0
    parameters: int = 0
    bytes: int = 0
    used_columns: dict[str, float] = field(default_factory=dict)
    distribution: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def std(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    @property
    def share(self) -> float:
        """Trained scalars in percent."""
        return 100 * self.trained / self.parameters

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}" if len(self.accuracies) > 1 else f"{self.mean:.1f}"


@dataclass
class Results:
    """Everything that the table, the picture and the JSON file show."""

    study: str
    seeds: list[int]
    shots: int
    epochs: int
    test_images: int
    rows: list[Runs]


def run(
    study: str, seeds: Sequence[int] = (0, 1, 2), quiet: bool = False, folder: Path = Path("demo-output"),
    shots: int = SHOTS, epochs: int = EPOCHS, tested: int | None = None,
) -> Results:  # fmt: skip
    """Fine-tunes the demo's model with every variant and seed. Seeds draw images, head and order.

    Args:
        shots, tested: images of each class for training and for testing; None: all others.
    """
    variants = _variants(study)
    rows = [Runs(each.name, each.method, dict(each.options), each.rate) for each in variants]
    results = Results(study, list(seeds), shots, epochs, 0, rows)
    with one_thread(), tempfile.TemporaryDirectory() as scratch:
        _, model = prepare(folder, quiet)
        bar = tqdm(total=len(seeds) * len(variants), unit="run", leave=False, disable=True if quiet else None)
        for seed in seeds:
            data = write_folder(Path(scratch, f"data-{seed}"), NEW, {"train": shots, "test": tested}, seed, REPORTED)
            for each, row in zip(variants, rows, strict=True):
                bar.set_description(f"seed {seed}, {each.name}")
                output = Path(scratch, f"{seed}-{each.name.replace(' ', '-')}")
                found = finetune(_config(each, each.rate, data, model, output, seed, epochs), quiet=True)
                results.test_images = found.metrics["samples"]
                row.accuracies.append(found.metrics["top1"])
                if len(row.accuracies) == 1:
                    _describe(row, found.results, output)
                bar.update()
        bar.close()
    return results


def tune(
    study: str, seeds: Sequence[int] = (100,), rates: Sequence[float] = RATES, folder: Path = Path("demo-output")
) -> dict[str, dict[float, float]]:
    """The mean accuracy of every variant at each rate, on the images that are reserved for this."""
    found: dict[str, dict[float, float]] = {}
    with one_thread(), tempfile.TemporaryDirectory() as scratch:
        _, model = prepare(folder)
        data = {
            seed: write_folder(Path(scratch, f"{seed}"), NEW, {"train": SHOTS, "test": None}, seed, TUNING)
            for seed in seeds
        }
        for number, (each, rate) in enumerate((each, rate) for each in _variants(study) for rate in rates):
            scores = [
                finetune(
                    _config(each, rate, data[seed], model, Path(scratch, f"run-{number}-{seed}"), seed, EPOCHS),
                    quiet=True,
                ).metrics["top1"]
                for seed in seeds
            ]
            found.setdefault(each.name, {})[rate] = statistics.mean(scores)
            print(f"{each.name:<24}{rate:>8g}{statistics.mean(scores):>8.1f}", flush=True)
    return found


def _variants(study: str) -> list[Variant]:
    return [each for variants in STUDIES[study].values() for each in variants]


def _config(each: Variant, rate: float, data: Path, model: Path, output: Path, seed: int, epochs: int) -> Config:
    return Config.from_dict(
        {
            "data": {"path": str(data), "augmentation": "none"},
            "model": {"name": str(model)},
            "method": {"name": each.method, "options": dict(each.options)},
            "recipe": {"epochs": epochs, "learning_rate": rate, "warmup": "inside"},
            "output": {"folder": str(output), "report": False, "save_steps": 10**6},
            "seed": seed,
            "device": "cpu",
        }
    )


def _describe(row: Runs, results: Mapping[str, Any], output: Path) -> None:
    row.trained, row.parameters, row.bytes = results["trained"], results["parameters"], results["bytes"]
    if row.method in ("gps", "grft"):
        selection = Selection.load(output / SELECTION)
        row.distribution = selection.by_block().shares()
        row.used_columns = {
            name: 100 * mask.used_columns().numel() / math.prod(mask.shape[1:])
            for name, mask in selection.items()
            if mask.kind == "per-row"
        }


def table(results: Results) -> str:
    """The results in Markdown, as the documentation has them, section by section, with differences to GPS."""
    rows = {row.variant: row for row in results.rows}
    gps = rows[GPS.name]
    lines = ["| | accuracy % | against GPS | trained % | result, bytes |", "|---|---|---|---|---|"]
    for section, variants in STUDIES[results.study].items():
        lines += [f"| *{section}* | | | | |"] if section else []
        for row in (rows[each.name] for each in variants):
            against = "" if row is gps else f"{row.mean - gps.mean:+.1f}"
            name = f"**{row.variant}**" if row is gps else row.variant
            lines.append(f"| {name} | {row} | {against} | {row.share:.2f} | {row.bytes:,} |")
    return "\n".join(lines)


def save(results: Results, path: Path) -> None:
    """Writes all results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def load(path: Path) -> Results:
    """The inverse of :func:`save`."""
    values = json.loads(path.read_text())
    return Results(**{**values, "rows": [Runs(**row) for row in values["rows"]]})


def draw(results: Results, path: Path) -> None:
    """The accuracy of every variant; and how few inputs the selected weights read, or the blocks they lie in."""
    rows = {row.variant: row for row in results.rows}
    colours = {each.name: each.colour for each in _variants(results.study)}
    panels = 2 if results.study == "methods" else 3
    drawing, (left, *others) = plots.figure(panels, 7 * panels, 0.55 * len(rows) + 2)
    plots.accuracies(
        left,
        {name: row.accuracies for name, row in rows.items()},
        {name: f"{row.share:.3g} % of the weights" for name, row in rows.items()},
        colours,
    )
    left.set_title(f"Digits {NEW[0]}-{NEW[-1]}, {results.shots} examples of each")
    if results.study == "methods":
        plots.used_columns(
            others[0], {name: row.used_columns for name, row in rows.items() if row.used_columns}, colours
        )
        others[0].set_title("How much of each layer's input the selected weights read")
    else:
        others[1].sharey(others[0])  # one scale, so that heights can be compared
        for axes, name in zip(others, ("net", GPS.name), strict=True):
            plots.distribution(axes, rows[name].distribution)
            axes.set_xlabel(f"{name}: where its weights lie (seed {results.seeds[0]})")
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(drawing, path)
