"""What an experiment needs and costs: its data, its steps, and hours from a measured step of its models."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.errors import one_line
from gradsel.experiments.papers.experiment import Cell, Experiment
from gradsel.experiments.papers.planning import config_of
from gradsel.experiments.papers.running import find, said
from gradsel.experiments.papers.sources import SOURCES
from gradsel.methods import Context, method
from gradsel.papers.presets import DATA_SETS
from gradsel.papers.printed import printed
from gradsel.training.config import Config
from gradsel.training.models import load_model, logits_of
from gradsel.training.recipe import precision_dtype

#: Samples of a measured step on a CPU, whose time grows with their number.
_ON_CPU = 4
_TRAINS = ("accuracy", "robustness", "few_shot", "memory", "tsne", "regularized")
#: What a sample costs in testing, in steps of training by sample: a forward pass of three.
_TESTING = 1 / 3


@dataclass(frozen=True)
class Load:
    """What one run asks for.

    Attributes:
        steps: of the optimizer.
        tests: samples that are tested.
    """

    steps: int
    tests: int


def load_of(experiment: Experiment, cell: Cell, config: Config) -> Load:
    """Steps and tests of one run, from the sizes that the papers give."""
    source = SOURCES[cell.data]
    samples = source.train
    if experiment.measure == "few_shot":
        samples = 1000 * experiment.settings[cell.setting]["shots"]
    epochs = config.recipe.epochs + config.recipe.cooldown_epochs
    if config.method.name == "grft" and config.recipe.warmup is None:
        epochs += math.ceil(config.recipe.warmup_epochs or 0)
    tests = source.test + sum(SOURCES[name].test for name in experiment.also)
    return Load(math.ceil(samples / config.recipe.batch_size) * epochs, tests)


def described(
    experiment: Experiment, root: Path | None, only: Sequence[str] = (), seeds: int | None = None,
    given: Mapping[str, Any] | None = None, measure: bool = False,
) -> str:  # fmt: skip
    """What an experiment consists of, what data it lacks and where they are had, and what it costs.

    Args:
        root, only, seeds, given: as for :func:`gradsel.experiments.papers.run`.
        measure: measure a step of each model and method here, with random weights.

    Raises:
        ValueError: something does not fit.
    """
    cells = experiment.cells(only, seeds)
    places, lacking = find(experiment, cells, root)
    lines = [f"{experiment.name}: {experiment.title} ({experiment.source})", f"runs: {len(cells)}"]
    for label, names in (
        ("models", dict.fromkeys(cell.model for cell in cells)),
        ("methods", dict.fromkeys(f"{cell.method} ({experiment.methods[cell.method]})" for cell in cells)),
        ("settings", dict.fromkeys(cell.setting for cell in cells if cell.setting)),
    ):
        if names:
            lines.append(f"{label}: {', '.join(names)}")
    lines += [f"data: {name} in {place}" for name, place in places.items()]
    lines += [f"lacks: {said(name)}" for name in lacking]
    lines.append(f"paper: {_stated(experiment)}")
    lines += [f"note: {note}" for note in experiment.notes]
    if experiment.measure not in _TRAINS:
        passes = "; a pass over the training set for each run" if experiment.data else ""
        return "\n".join([*lines, f"cost: nothing is trained{passes}"])
    loads = loads_of(experiment, cells, places, given)
    weights = dict.fromkeys(c.model.name for _, c, _ in loads if c.model.weights == "pretrained")
    if weights:
        lines.append(f"weights: {', '.join(weights)}, from the model hub")
    lines.append(f"steps: {sum(load.steps for _, _, load in loads):,} in all, and "
                 f"{sum(load.tests for _, _, load in loads):,} samples to test")  # fmt: skip
    return "\n".join([*lines, *_hours(loads, measure)])


def _stated(experiment: Experiment) -> str:
    """Which numbers of the paper ours are compared with, and which ones it does not have."""
    table = printed().get(experiment.name)
    if table is None:
        return "no numbers are printed; it shows this by a figure, or not at all"
    lacks = []
    if table.metric == "difference":
        lacks.append("the numbers of each method")
    else:
        rows = {name for row in table.rows for name in (row, row.rpartition(" + ")[2])}
        lacks += [name for name in experiment.methods if name not in rows]
    if not set(experiment.metrics) & set(table.columns):
        columns = {name for column in table.columns for model in experiment.models for name in
                   (column, column.removeprefix(f"{model} "))}  # fmt: skip
        lacks += [name for name in experiment.data if name not in columns]
    return f"numbers of {table.source}" + (f"; not printed: {', '.join(lacks)}" if lacks else "")


def loads_of(
    experiment: Experiment, cells: Sequence[Cell], places: Mapping[str, Path] | None = None,
    given: Mapping[str, Any] | None = None,
) -> list[tuple[Cell, Config, Load]]:  # fmt: skip
    """The runs of an experiment that train, each with its settings and with what it asks for.

    Args:
        places: the folders of the data sets that are there.
        given: settings that override the experiment's, by dotted names.
    """
    if experiment.measure not in _TRAINS:
        return []
    anywhere = {name: (places or {}).get(name, Path(name)) for name in SOURCES}
    planned = [(cell, config_of(experiment, cell, Path("run"), anywhere, given or {})[0]) for cell in cells]
    return [(cell, config, load_of(experiment, cell, config)) for cell, config in planned]


@dataclass(frozen=True)
class Hours:
    """What runs cost on a device, from a measured step of each.

    Attributes:
        hours: of all runs whose step could be measured; loading is not counted.
        least, most: seconds of a step; NaN if none could be measured.
        unknown: models and methods whose step could not be measured, and why.
    """

    hours: float
    least: float
    most: float
    unknown: tuple[str, ...]


def hours_of(loads: Sequence[tuple[Cell, Config, Load]], device: str, samples: dict[Any, float | str]) -> Hours:
    """Measures a step of each model and method, unless it is known, and adds up what the runs take.

    Args:
        samples: seconds for each sample of a training step by model and method, or why they are unknown. Measured ones
            are added.
    """
    steps: list[float] = []
    hours = 0.0
    unknown: dict[str, None] = {}
    for cell, config, load in loads:
        key = key_of(config, device)
        if key not in samples:
            try:
                samples[key] = step_seconds(config, len(_classes(cell)), device) / config.recipe.batch_size
            except (ValueError, OSError, ModuleNotFoundError) as error:
                samples[key] = one_line(error)
        each = samples[key]
        if isinstance(each, str):
            unknown[f"{cell.model}, {cell.method} ({each})"] = None
            continue
        steps.append(each * config.recipe.batch_size)
        hours += each * (config.recipe.batch_size * load.steps + _TESTING * load.tests) / 3600
    return Hours(hours, min(steps, default=math.nan), max(steps, default=math.nan), tuple(unknown))


def key_of(config: Config, device: str) -> Any:
    """What the time of a sample in a training step depends on; on a GPU also on how many there are."""
    return config.model.name, str(config.method), config.recipe.batch_size if device == "cuda" else 0


def _hours(loads: Sequence[tuple[Cell, Config, Load]], measure: bool) -> list[str]:
    if not measure:
        return ["hours here: unknown; --measure takes a step of each model and method",
                "hours on a GPU: unknown; --measure there"]  # fmt: skip
    lines = []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        where = "here, on the CPU" if device == "cpu" else f"on {torch.cuda.get_device_name()}"
        found = hours_of(loads, device, {})
        if not math.isnan(found.least):
            span = f"{found.least:.3g} to {found.most:.3g} s a step"
            lines.append(f"hours {where}: {found.hours:,.2f}, at {span}; loading is not counted")
        lines += [f"hours {where}: unknown for {each}" for each in found.unknown]
    if "cuda" not in devices:
        lines.append("hours on a GPU: unknown, as there is none here; --measure there")
    return lines


def _classes(cell: Cell) -> list[str]:
    count = DATA_SETS[cell.data].classes if cell.data in DATA_SETS else 1000
    return [str(number) for number in range(count)]


def step_seconds(config: Config, classes: int, device: str) -> float:
    """Seconds of a training step of an image classifier with random weights, at the batch size of the configuration.

    The second step counts. On a CPU a step of few samples is measured, and scaled.

    Raises:
        ValueError: the model is for another kind of data, or the method does not fit it.
    """
    if config.data.task != "classification":
        raise ValueError(f"only steps of image classifiers are measured, not of {config.data.task}")
    model = config.replaced({"model.weights": "none"}).model
    loaded = load_model(model, [str(number) for number in range(classes)], "images", 0, config.data.image_size)
    assert loaded.image is not None
    batch = config.recipe.batch_size if device == "cuda" else min(_ON_CPU, config.recipe.batch_size)
    network = loaded.model.to(device)
    inputs = {
        "pixel_values": torch.randn(batch, 3, *loaded.image.size, device=device),
        "labels": torch.arange(batch, device=device) // 2 % classes,
    }
    how = method(config.method.name, **_without_subsets(config.method.options))
    context = Context(head=loaded.head, parts=loaded.parts, progress=False)
    prepared = how.prepare(network, [inputs] if how.needs_batches else None, context)
    optimizer = how.optimizer(prepared.model, 1e-5)
    prepared.model.train()
    taken = 0.0
    for _ in range(2):
        _wait(device)
        began = time.perf_counter()
        _step(prepared.model, optimizer, inputs, config)
        _wait(device)
        taken = time.perf_counter() - began
    return taken * config.recipe.batch_size / batch


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor], config: Config) -> None:
    optimizer.zero_grad()
    dtype = precision_dtype(config.precision)
    with torch.autocast(inputs["labels"].device.type, dtype, enabled=dtype is not None):
        logits = logits_of(model, {"pixel_values": inputs["pixel_values"]})
        loss = nn.functional.cross_entropy(logits.float(), inputs["labels"])
    loss.backward()
    optimizer.step()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _without_subsets(options: Mapping[str, Any]) -> dict[str, Any]:
    """A selection on random images is as costly without parts of the data."""
    return {name: value for name, value in options.items() if name != "subsets"}
