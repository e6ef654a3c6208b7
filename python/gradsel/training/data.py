"""Reading data: folders of images, tables of texts; their classes and splits, checked before any training."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gradsel.parameters.names import did_you_mean
from gradsel.training.config import DataConfig

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
LABELS = ("label", "labels", "class", "target", "category", "sentiment", "y")
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text",),
    ("sentence",),
    ("review",),
    ("content",),
)


class Split(NamedTuple):
    """Part of the data.

    Attributes:
        inputs: paths of images, or tuples of one or two texts.
        labels: numbers of classes.
    """

    inputs: list[Any]
    labels: list[int]


@dataclass(frozen=True)
class Data:
    """Everything there is to train and test on.

    Attributes:
        kind: ``"images"`` or ``"texts"``.
        classes: names, in the order of the labels.
        splits: ``"train"``, ``"test"``, and ``"validation"`` if there is one.
        notes: what was found and left out, for the log.
    """

    kind: str
    classes: list[str]
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)


def read_data(config: DataConfig, seed: int = 0) -> Data:
    """Reads and checks the data that a configuration names.

    Args:
        seed: of the split, where the data have no test set.

    Raises:
        ValueError: there are no such data, or something is wrong with them: unreadable files, empty classes, labels out
            of range, classes that only the test set has. The message names and counts them.
    """
    path = Path(config.path)
    if not path.exists():
        raise ValueError(f"data.path: there is no file or folder {config.path}")
    kind = _kind(config, path)
    data = _images(config, path) if kind == "images" else _texts(config, path)
    _require_classes(data)
    if "test" not in data.splits:
        train, test = hold_out(data.splits["train"], config.holdout, seed)
        data.notes.append(f"the data have no test set: {len(test.labels):,} samples are held out, with seed {seed}")
        data.splits.update(train=train, test=test)
    for name, split in data.splits.items():
        if not split.labels:
            raise ValueError(f"data: the {name} set is empty")
    return data


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Splits at random, each class alike; both parts get at least one sample of a class that has two."""
    drawn = random.Random(seed)
    by_class: dict[int, list[int]] = {}
    for number, label in enumerate(split.labels):
        by_class.setdefault(label, []).append(number)
    held: set[int] = set()
    for label in sorted(by_class):
        numbers = by_class[label]
        drawn.shuffle(numbers)
        held.update(numbers[: min(max(round(fraction * len(numbers)), 1), len(numbers) - 1)])
    return tuple(  # type: ignore[return-value]
        Split(
            [split.inputs[n] for n in range(len(split.labels)) if (n in held) is test],
            [split.labels[n] for n in range(len(split.labels)) if (n in held) is test],
        )
        for test in (False, True)
    )


def _kind(config: DataConfig, path: Path) -> str:
    if config.kind != "auto":
        return config.kind
    if path.is_file():
        if path.suffix not in TABLES:
            raise ValueError(f"data.path: {path} is not a table; known are {', '.join(TABLES)}, or a folder")
        return "texts"
    tables = any(each.suffix in TABLES for each in path.iterdir() if each.is_file())
    return "texts" if tables and not any(each.is_dir() for each in path.iterdir() if _visible(each)) else "images"


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__"))


def _require_classes(data: Data) -> None:
    train = data.splits["train"]
    counts = Counter(train.labels)
    empty = [name for number, name in enumerate(data.classes) if not counts[number]]
    if empty:
        raise ValueError(f"data: {len(empty)} classes have no training sample: {_some(empty)}")
    if len(data.classes) < 2:
        raise ValueError(f"data: there is one class only, {data.classes[0]!r}; at least two are needed")


def _some(names: Iterable[Any], most: int = 5) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


# --- Images ------------------------------------------------------------------------------------------------------


def _images(config: DataConfig, path: Path) -> Data:
    if not path.is_dir():
        raise ValueError(f"data.path: {path} is a file; images are expected in a folder with one folder per class")
    folders = _split_folders(path)
    found = {name: _classes_of(folder) for name, folder in folders.items()}
    classes = sorted(found["train"])
    if not classes:
        raise ValueError(f"data.path: {folders['train']} has no folders, one for each class with its images")
    for name, by_class in found.items():
        if strange := sorted(set(by_class) - set(classes)):
            raise ValueError(
                f"data: {len(strange)} classes of the {name} set have no folder in training: {_some(strange)}"
            )
    notes: list[str] = []
    bad = unreadable([file for by_class in found.values() for files in by_class.values() for file in files])
    if bad:
        listed = f"{len(bad)} images cannot be read: {_some(bad)}"
        if not config.skip_unreadable:
            raise ValueError(f"data: {listed}; pass --skip-unreadable to leave them out")
        notes.append(f"left out: {listed}")
    splits, left_out = {}, set(bad)
    for name, by_class in found.items():
        pairs = [
            (str(file), number)
            for number, label in enumerate(classes)
            for file in by_class.get(label, ())
            if str(file) not in left_out
        ]
        splits[name] = Split([file for file, _ in pairs], [number for _, number in pairs])
    return Data("images", classes, splits, notes)


def _split_folders(path: Path) -> dict[str, Path]:
    inside = {each.name.lower(): each for each in sorted(path.iterdir()) if each.is_dir()}
    found = {
        split: next(inside[name] for name in names if name in inside)
        for split, names in SPLITS.items()
        if any(name in inside for name in names)
    }
    if found and "train" not in found:
        raise ValueError(f"data.path: {path} has {_some(f.name for f in found.values())}, but no folder train")
    if not found:
        return {"train": path}
    if "test" not in found and "validation" in found:
        # With one further set, that is the test set, and nothing is chosen by it.
        found["test"] = found.pop("validation")
    return found


def _classes_of(folder: Path) -> dict[str, list[Path]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return {
        label.name: sorted(
            file for file in label.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
        )
        for label in sorted(folder.iterdir())
        if label.is_dir() and _visible(label)
    }


def unreadable(paths: Sequence[Path]) -> list[str]:
    """The images that cannot be decoded, found by decoding all of them."""
    with ThreadPoolExecutor(4) as pool:
        return [str(path) for path, good in zip(paths, pool.map(_is_readable, paths), strict=True) if not good]


def _is_readable(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (64, 64))  # JPEG is then decoded at an eighth of its size
            image.load()
    except Exception:  # PIL raises whatever its decoders do
        return False
    return True


# --- Texts -------------------------------------------------------------------------------------------------------


def _texts(config: DataConfig, path: Path) -> Data:
    tables = {name: _table(file) for name, file in _split_files(path).items()}
    columns = tables["train"].column_names
    label = _label_column(config, columns)
    texts = _text_columns(config, tables["train"], label)
    for name, table in tables.items():
        if missing := [column for column in (label, *texts) if column not in table.column_names]:
            raise ValueError(
                f"data: the {name} set has no column {missing[0]!r}; it has {', '.join(table.column_names)}"
            )
    given = {name: list(table[label]) for name, table in tables.items()}
    names = getattr(tables["train"].features[label], "names", None)
    classes = _class_names(given, label, names)
    numbers = {value: number for number, (value, _) in enumerate(classes)}
    splits = {}
    for name, table in tables.items():
        rows = list(zip(*(table[column] for column in texts), strict=True))
        _require_text(name, rows, texts)
        splits[name] = Split(rows, [numbers[value] for value in given[name]])
    notes = [f"texts from {' and '.join(texts)}, classes from {label}"]
    return Data("texts", [name for _, name in classes], splits, notes)


def _split_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    inside = {each.stem.lower(): each for each in sorted(path.iterdir()) if each.suffix in TABLES}
    found = {
        split: next(inside[name] for name in names if name in inside)
        for split, names in SPLITS.items()
        if any(name in inside for name in names)
    }
    if "train" not in found:
        has = f"it has {_some(file.name for file in inside.values())}" if inside else "it has no table"
        raise ValueError(f"data.path: {path} has no train.csv (or .tsv, .jsonl, .parquet); {has}")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return found


def _table(path: Path) -> Any:
    import datasets

    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    quiet = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # of whichever parser
        cause = error.__cause__ or error
        raise ValueError(f"data.path: {path} cannot be read as {TABLES[path.suffix]} ({type(cause).__name__}: "
                         f"{' '.join(str(cause).split())[:200]})") from error  # fmt: skip
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _label_column(config: DataConfig, columns: Sequence[str]) -> str:
    if config.label_column is not None:
        if config.label_column not in columns:
            hint = did_you_mean(config.label_column, columns)
            raise ValueError(
                f"data.label_column: there is no column {config.label_column!r}{hint}; there are {', '.join(columns)}"
            )
        return config.label_column
    found = [column for name in LABELS for column in columns if column.lower() == name]
    if not found:
        raise ValueError(f"data: which column has the class? pass --label-column, one of {', '.join(columns)}")
    return found[0]


def _text_columns(config: DataConfig, table: Any, label: str) -> list[str]:
    columns = table.column_names
    if config.text_columns is not None:
        for column in config.text_columns:
            if column not in columns:
                hint = did_you_mean(column, columns)
                raise ValueError(
                    f"data.text_columns: there is no column {column!r}{hint}; there are {', '.join(columns)}"
                )
        if not 1 <= len(config.text_columns) <= 2:
            raise ValueError(f"data.text_columns must be one or two columns, got {len(config.text_columns)}")
        return list(config.text_columns)
    lower = {column.lower(): column for column in columns if column != label}
    for names in TEXTS:
        if all(name in lower for name in names):
            return [lower[name] for name in names]
    strings = [
        name for name in columns if name != label and "string" in str(getattr(table.features[name], "dtype", ""))
    ]
    if 1 <= len(strings) <= 2:
        return strings
    raise ValueError(f"data: which columns have the texts? pass --text-column, one or two of {', '.join(columns)}")


def _class_names(given: Mapping[str, Sequence[Any]], column: str, names: Sequence[str] | None) -> list[tuple[Any, str]]:
    """The value of every class in the table, and its name."""
    for name, values in given.items():
        bad = [number for number, value in enumerate(values) if _out_of_range(value, names)]
        if bad:
            seen = ", ".join(sorted({repr(values[number]) for number in bad})[:5])
            raise ValueError(
                f"data: {len(bad)} labels of the {name} set are out of range or missing in column {column!r} "
                f"(values {seen}; first in row {bad[0] + 1})"
            )
    if names is not None:
        return list(enumerate(names))
    known = sorted(set(given["train"]), key=lambda value: (isinstance(value, str), value))
    for name, values in given.items():
        if strange := sorted(set(values) - set(known), key=str):
            rows = sum(value in strange for value in values)
            raise ValueError(f"data: {len(strange)} classes are in the {name} set only ({rows} rows): {_some(strange)}")
    if len(known) > 1000 or (len(known) > 20 and len(known) == len(given["train"])):
        raise ValueError(f"data: column {column!r} has {len(known):,} different values, so it is not a class")
    return [(value, str(value)) for value in known]


def _out_of_range(value: Any, names: Sequence[str] | None) -> bool:
    if value is None or (isinstance(value, float) and (math.isnan(value) or value != int(value))):
        return True
    if isinstance(value, (int, float)):
        return value < 0 or (names is not None and value >= len(names))
    return not str(value).strip()


def _require_text(name: str, rows: Sequence[tuple], columns: Sequence[str]) -> None:
    bad = [number for number, row in enumerate(rows) if not all(isinstance(text, str) and text.strip() for text in row)]
    if bad:
        raise ValueError(
            f"data: {len(bad)} rows of the {name} set have no text in {' or '.join(columns)}, first row {bad[0] + 1}"
        )
