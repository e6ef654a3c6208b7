"""Tasks of GLUE (Wang et al., ICLR 2019): their data, from the hub or as distributed, and their metrics."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gradsel.training.config import DataConfig
from gradsel.training.libraries import is_saved, read_dataset
from gradsel.training.splits import Data, Split, some
from gradsel.training.tables import TABLES, loaded, read_tables

#: The hub's data set with all tasks.
HUB = "nyu-mll/glue"


class Task(NamedTuple):
    """A task of GLUE.

    Attributes:
        classes: names, in the order of the labels.
        columns: of the texts.
        metrics: what its results are given in.
        training, testing: candidates for files with the training and the development set; the first ones found count.
    """

    classes: tuple[str, str]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    training: tuple[tuple[str, ...], ...]
    testing: tuple[tuple[str, ...], ...]


TASKS = {
    "glue/cola": Task(
        ("unacceptable", "acceptable"), ("sentence",), ("matthews", "accuracy"),
        (("train.tsv",), ("raw/in_domain_train.tsv",)),
        (("dev.tsv",), ("raw/in_domain_dev.tsv", "raw/out_of_domain_dev.tsv")),
    ),
    "glue/mrpc": Task(
        ("not_equivalent", "equivalent"), ("sentence1", "sentence2"), ("f1", "accuracy"),
        (("train.tsv",), ("msr_paraphrase_train.txt",)),
        (("dev.tsv",), ("msr_paraphrase_test.txt",)),
    ),
    "glue/rte": Task(
        ("entailment", "not_entailment"), ("sentence1", "sentence2"), ("accuracy",),
        (("train.tsv",),), (("dev.tsv",),),
    ),
}  # fmt: skip


def read_glue(config: DataConfig) -> Data:
    """Reads a task: from the hub, or from a folder with the distributed files, what ``save_to_disk`` wrote, or tables.

    The development set is the test set, as the labels of GLUE's test sets are not published.

    Raises:
        ValueError: the files are missing or damaged, or the hub cannot be reached.
    """
    task = TASKS[config.task]
    name = config.task.partition("/")[2]
    if not config.path:
        failed = f"data.task: {config.task} cannot be fetched from the hub; pass --data with a folder of its files"
        return read_dataset(config, loaded(lambda datasets: datasets.load_dataset(HUB, name), failed))
    path = Path(config.path)
    if path.is_file():
        return read_tables(config, path)
    if not path.is_dir():
        raise ValueError(f"data.path: there is no folder {path} with the files of {config.task}")
    if is_saved(path):
        failed = f"data.path: {path} cannot be read"
        return read_dataset(config, loaded(lambda datasets: datasets.load_from_disk(str(path)), failed))
    files = {
        split: next((names for names in candidates if all((path / each).is_file() for each in names)), None)
        for split, candidates in (("train", task.training), ("test", task.testing))
    }
    if None in files.values():
        if any(each.suffix in TABLES and each.suffix != ".tsv" for each in path.iterdir()):
            return read_tables(config, path)
        expected = " or ".join(" and ".join(names) for names in (*task.training, *task.testing))
        raise ValueError(f"data.path: {path} has not the files of {config.task}; expected are {expected}")
    splits = {
        split: Split(
            *map(list, zip(*(row for each in names or () for row in _rows(path / each, config.task)), strict=True))
        )
        for split, names in files.items()
    }
    read = ", ".join(each for names in files.values() for each in names or ())
    note = f"{config.task} from {read}; the development set is the test set, as GLUE's test labels are not published"
    return Data("texts", list(task.classes), splits, [note], published=True)


def _rows(path: Path, task: str) -> list[tuple[tuple[str, ...], int]]:
    """Texts and label of every line.

    Raises:
        ValueError: lines have other columns or labels than the task; the message counts them.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {path} cannot be read ({error})") from None
    first, parse = _PARSERS[task]
    rows, bad = [], []
    for number, line in enumerate(lines[first:], first + 1):
        try:
            texts, label = parse(line)
            rows.append((texts, TASKS[task].classes.index(label) if label in TASKS[task].classes else int(label)))
            if rows[-1][1] not in (0, 1) or not all(text.strip() for text in texts):
                raise ValueError
        except (IndexError, ValueError):
            bad.append(number)
    if bad:
        raise ValueError(
            f"data: {len(bad)} lines of {path} are not those of {task}: wrong columns or label: {some(bad)}"
        )
    if not rows:
        raise ValueError(f"data: {path} has no rows")
    return rows


def _cola(line: list[str]) -> tuple[tuple[str, ...], str]:
    """Source, label, the author's mark, sentence."""
    return (line[3],), line[1]


def _mrpc(line: list[str]) -> tuple[tuple[str, ...], str]:
    """Label, two numbers, two sentences."""
    return (line[3], line[4]), line[0]


def _rte(line: list[str]) -> tuple[tuple[str, ...], str]:
    """Number, two sentences, label."""
    return (line[1], line[2]), line[3]


_Parser = Callable[[list[str]], tuple[tuple[str, ...], str]]
#: Lines of the header, and what reads a line.
_PARSERS: dict[str, tuple[int, _Parser]] = {"glue/cola": (0, _cola), "glue/mrpc": (1, _mrpc), "glue/rte": (1, _rte)}


def metric_of(task: str) -> str:
    """The metric that chooses the best epoch: the first one of a task of GLUE; of all others, ``"top1"``."""
    return TASKS[task].metrics[0] if task in TASKS else "top1"


def scores(task: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of a task, by scikit-learn, in percent: accuracy, F1 of the class 1, Matthews' correlation.

    Args:
        logits: [samples, 2].
        labels: [samples].
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    kinds: dict[str, Callable[..., Any]] = {
        "accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef
    }  # fmt: skip
    truth, guess = labels.numpy(), logits.argmax(1).numpy()
    options: dict[str, dict[str, Any]] = {"f1": {"zero_division": 0}}
    return {name: 100 * float(kinds[name](truth, guess, **options.get(name, {}))) for name in TASKS[task].metrics}
