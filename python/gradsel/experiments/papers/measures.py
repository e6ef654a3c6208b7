"""What is measured in one run of an experiment: each measure takes a configuration and returns numbers by name."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradsel.errors import RunError
from gradsel.experiments.papers import cost, masks, selections, sparse
from gradsel.experiments.papers.memory import MemoryOverTime
from gradsel.experiments.papers.selections import Measured
from gradsel.experiments.working import run_or_continue
from gradsel.training import evaluate
from gradsel.training.changed import Fingerprint, difference, fingerprint
from gradsel.training.config import Config
from gradsel.training.folder import write_text
from gradsel.training.tasks import task_of


@dataclass(frozen=True)
class Job:
    """A run and what its measure may need.

    Attributes:
        config: its settings; ``config.output.folder`` is for the result.
        folder: for what a measure writes besides.
        shared: the same for all runs, for data that several of them train on.
        setting: what is varied, with options of the measure.
        places: folders of data sets.
        small: toy sizes, for measures that have models of their own.
    """

    config: Config
    folder: Path
    shared: Path
    setting: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, Path] = field(default_factory=dict)
    small: bool = False


def accuracy(job: Job) -> Measured:
    """Fine-tunes, and tests: top-1 accuracy, or mDice and mIoU of masks, in percent."""
    return _measured(run_or_continue(job.config))


def robustness(job: Job) -> Measured:
    """Fine-tunes on ImageNet-1K, and tests on it and on three sets that are unlike it (GPS, Tab. 8)."""
    results = run_or_continue(job.config)
    folder = job.config.output.folder
    values = {"ImageNet-1K": results["metrics"]["top1"]}
    for name in ("ImageNet-A", "ImageNet-R"):
        values[name] = evaluate(folder, job.places[name])["top1"]
    errors = [
        100 - evaluate(folder, severity)["top1"]
        for corruption in _folders(job.places["ImageNet-C"])
        for severity in _folders(corruption)
    ]
    if not errors:
        raise RunError(f"ImageNet-C: {job.places['ImageNet-C']} has no folder CORRUPTION/SEVERITY")
    return Measured({**values, "ImageNet-C": statistics.fmean(errors)}, results)


def few_shot(job: Job) -> Measured:
    """Fine-tunes on the same few training samples of each class for all methods, drawn by the seed (GPS, Fig. 5)."""
    shots, seed = job.setting["shots"], job.config.seed
    tables = job.shared / f"shots={shots}-seed={seed}"
    if not (tables / "train.csv").is_file():
        tables.mkdir(parents=True, exist_ok=True)
        data = task_of(job.config).read(job.config)
        for name in ("test", "train"):  # the last, as its file says that all are there
            split = data.splits[name]
            chosen = _few(split.labels, shots, seed) if name == "train" else range(len(split.labels))
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["image", "label"])
            writer.writerows([Path(split.inputs[n]).absolute(), data.classes[split.labels[n]]] for n in chosen)
            write_text(tables / f"{name}.csv", text.getvalue())
    return accuracy(Job(job.config.replaced({"data.path": str(tables), "data.layout": "auto"}), job.folder, job.shared))


def memory(job: Job) -> Measured:
    """Fine-tunes, and writes down memory and time after every step (GRFT, Fig. 3)."""
    trace = MemoryOverTime(job.folder / "memory.csv")
    results = run_or_continue(job.config, callbacks=[trace])
    rows = trace.rows()
    used = [size for _, _, size in rows]
    values = {
        "peak MB": max(used) / 2**20, "mean MB": statistics.fmean(used) / 2**20, "seconds": rows[-1][1] - rows[0][1]
    }  # fmt: skip
    return Measured({**_measured(results).values, **values}, results)


def _measured(results: Mapping[str, Any]) -> Measured:
    found = results["metrics"]
    names = {"top1": "top1", "mdice": "mDice", "miou": "mIoU", "matthews": "matthews", "f1": "f1"}
    values = {name: found[key] for key, name in names.items() if key in found and math.isfinite(found[key])}
    return Measured({**values, "percent": results["share"]}, dict(results))


def _few(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """Numbers of samples: as many as ``shots`` of each class, or all if it has fewer."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    taken: dict[int, int] = {}
    chosen = []
    for number in order:
        if taken.get(labels[number], 0) < shots:
            taken[labels[number]] = taken.get(labels[number], 0) + 1
            chosen.append(number)
    return sorted(chosen)


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir())


#: By name.
MEASURES: Mapping[str, Callable[[Job], Measured]] = {
    "accuracy": accuracy,
    "robustness": robustness,
    "few_shot": few_shot,
    "memory": memory,
    "distribution": lambda job: selections.distribution(job.config, job.folder),
    "overlap": lambda job: selections.chosen(job.config, job.folder),
    "tsne": lambda job: selections.tsne(job.config, job.folder),
    "regularized": lambda job: sparse.regularized(job.config, job.setting["pull"]),
    "masks": lambda job: masks.bytes_of_masks(job.config),
    "cost": lambda job: cost.measured(job.config, job.small),
}


def completed(job: Job, measure: str, data: dict[str, Fingerprint]) -> Measured:
    """What a measure says, which is kept in the folder of the run and read the next time.

    Args:
        data: fingerprints of the data of other jobs, by their settings, to which this one's is added.

    Raises:
        ValueError: the measure does not fit, or what was kept is about other data.
    """
    path = job.folder / "measured.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if "data" in before and (told := difference(before["data"], _data_of(job, data))):
            raise RunError(
                f"data.path: {job.config.data.path} has changed since the run in {job.folder} ended: {told}; put the "
                "data back, or begin anew with another --output"
            )
        return Measured(before["values"], before["results"])
    job.folder.mkdir(parents=True, exist_ok=True)
    found = MEASURES[measure](job)
    kept: dict[str, Any] = {
        name: found.results[name]
        for name in ("trained", "share", "steps", "seconds", "bytes", "peak_memory_bytes", "parameters")
        if name in found.results
    }
    found = Measured(found.values, kept)
    written = {"values": found.values, "results": found.results, "data": _data_of(job, data)}
    write_text(path, json.dumps(written, indent=1) + "\n")
    return found


def _data_of(job: Job, known: dict[str, Fingerprint]) -> Fingerprint:
    """The fingerprint of a job's data; empty if it has none."""
    config = job.config
    if not config.data.path:
        return {}
    key = json.dumps([config.to_dict()["data"], config.seed], default=str)
    if key not in known:
        known[key] = fingerprint(task_of(config).read(config), config.data.path)
    return known[key]
