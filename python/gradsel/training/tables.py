"""Tables of texts or of images: csv, jsonl and parquet files, and what the library datasets holds."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradsel.errors import did_you_mean
from gradsel.training.config import DataConfig
from gradsel.training.splits import Data, Split, Stored, checked_images, named_splits, some

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
LABELS = ("label", "labels", "class", "target", "category", "sentiment", "fine_label", "y")
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
IMAGES = ("image", "img", "image_path", "file_name", "filename", "filepath", "file", "path", "image_file")


def read_tables(config: DataConfig, path: Path) -> Data:
    """Reads a table, or a folder with ``train.csv``, ``test.csv`` and perhaps ``val.csv``.

    Raises:
        ValueError: a table cannot be read, or something is wrong with its columns or rows.
    """
    folder = path if path.is_dir() else path.parent
    return read_columns(config, {name: _table(file) for name, file in _split_files(path).items()}, folder)


def read_columns(config: DataConfig, tables: Mapping[str, Any], folder: Path | None = None) -> Data:
    """Reads the columns with the classes and with the texts or images.

    Args:
        tables: ``datasets.Dataset`` by split.
        folder: what paths of images are relative to.

    Raises:
        ValueError: a column is missing, or something is wrong with the rows.
    """
    columns = tables["train"].column_names
    label = _label_column(config, columns)
    image = _image_column(config, tables["train"], label)
    inputs = [image] if image is not None else _text_columns(config, tables["train"], label)
    for name, table in tables.items():
        if missing := [column for column in (label, *inputs) if column not in table.column_names]:
            raise ValueError(
                f"data: the {name} set has no column {missing[0]!r}; it has {', '.join(table.column_names)}"
            )
    if label in inputs:
        raise ValueError(f"data: column {label!r} has the class, so it cannot be an input, too; name another one")
    given = {name: [_whole(value) for value in table[label]] for name, table in tables.items()}
    known = getattr(tables["train"].features[label], "names", None)
    if known is None and config.classes is not None and not any(isinstance(v, str) for v in given["train"]):
        known = [str(number) for number in range(config.classes)]
    classes = _class_names(given, label, known)
    numbers = {value: number for number, (value, _) in enumerate(classes)}
    labels = {name: [numbers[value] for value in values] for name, values in given.items()}
    names = [name for _, name in classes]
    if image is not None:
        splits = {name: Split(_images(name, table, image, folder), labels[name]) for name, table in tables.items()}
        notes = [f"images from {image}, classes from {label}", *_notes_on(names)]
        return checked_images(config, splits, names, notes, published=known is not None)
    splits = {}
    for name, table in tables.items():
        rows = list(zip(*(table[column] for column in inputs), strict=True))
        _require_text(name, rows, inputs)
        splits[name] = Split(rows, labels[name])
    notes = [f"texts from {' and '.join(inputs)}, classes from {label}", *_notes_on(names)]
    return Data("texts", names, splits, notes, published=known is not None)


def _split_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"train": path}
    inside = {each.stem: each for each in sorted(path.iterdir()) if each.suffix.lower() in TABLES}
    found = {split: inside[name] for split, name in named_splits(inside).items()}
    if "train" not in found:
        has = f"it has {some(file.name for file in inside.values())}" if inside else "it has no table"
        raise ValueError(f"data.path: {path} has no train.csv (or .tsv, .jsonl, .parquet); {has}")
    return found


def _table(path: Path) -> Any:
    options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    kind = TABLES[path.suffix.lower()]
    if kind == "csv":
        _require_header(path, options.get("sep", ","))

    def load(datasets: Any) -> Any:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)

    return loaded(load, f"data.path: {path} cannot be read as {kind}")


def _require_header(path: Path, separator: str) -> None:
    """Checks the first line of a csv file: pandas renames the second of two columns with one name, and reads on."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=separator)
            names, first = next(lines, []), next(lines, None)
    except (OSError, UnicodeDecodeError, csv.Error):
        return  # what reads the whole table tells it
    if len(names) == 1 and (other := next((mark for mark in ";\t|," if mark in names[0]), None)):
        raise ValueError(
            f"data.path: the columns of {path} are separated by {other!r}; in a {path.suffix} file "
            f"they must be by {separator!r}"
        )
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"data.path: {path} has more than one column called {twice[0]!r}")
    if names and first is None:
        raise ValueError(f"data.path: {path} has no rows below its header")


def loaded(load: Callable[[Any], Any], failed: str) -> Any:
    """What a function gets from the library ``datasets``, without progress bars.

    Raises:
        ValueError: it fails; one line, which begins as told.
    """
    import datasets

    with _quiet(datasets):
        try:
            return load(datasets)
        except Exception as error:  # of whichever parser
            cause = error.__cause__ or error
            hint = "; save it in UTF-8" if isinstance(cause, UnicodeDecodeError) else ""
            told = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
            raise ValueError(f"{failed} ({told}){hint}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# --- Columns -----------------------------------------------------------------------------------------------------


def _chosen(name: str, column: str, columns: Sequence[str]) -> str:
    """A column that the configuration names."""
    if column not in columns:
        raise ValueError(
            f"{name}: there is no column {column!r}{did_you_mean(column, columns)}; there are {', '.join(columns)}"
        )
    return column


def _label_column(config: DataConfig, columns: Sequence[str]) -> str:
    if config.label_column is not None:
        return _chosen("data.label_column", config.label_column, columns)
    found = [column for name in LABELS for column in columns if column.lower() == name]
    if not found:
        raise ValueError(f"data: which column has the class? pass --label-column, one of {', '.join(columns)}")
    return found[0]


def _image_column(config: DataConfig, table: Any, label: str) -> str | None:
    """The column with images or their paths; None: the table is one of texts."""
    if config.image_column is not None:
        return _chosen("data.image_column", config.image_column, table.column_names)
    if config.kind == "texts" or config.text_columns is not None:
        return None
    columns = [name for name in table.column_names if name != label]
    for name in columns:
        if type(table.features[name]).__name__ == "Image":
            return name
    named = [column for name in IMAGES for column in columns if column.lower() == name]
    for name in named:
        if config.kind == "images" or _is_path(next(iter(table[name]), None)):
            return name
    if config.kind == "images":
        raise ValueError(f"data: which column has the images? pass --image-column, one of {', '.join(columns)}")
    return None


def _is_path(value: Any) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return isinstance(value, str) and value.lower().endswith(IMG_EXTENSIONS)


def _images(name: str, table: Any, column: str, folder: Path | None) -> list[Any]:
    """Paths, or the images themselves where the table holds them."""
    if type(table.features[column]).__name__ == "Image":
        images = table[column]
        return [Stored(images, index, f"the {name} set") for index in range(len(table))]
    values = list(table[column])
    bad = [number for number, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
    if bad:
        raise ValueError(f"data: {len(bad)} rows of the {name} set have no path in {column}, first row {bad[0] + 1}")
    return [str((folder or Path()) / value) for value in values]


def _text_columns(config: DataConfig, table: Any, label: str) -> list[str]:
    columns = table.column_names
    if config.text_columns is not None:
        for column in config.text_columns:
            _chosen("data.text_columns", column, columns)
        if not 1 <= len(set(config.text_columns)) == len(config.text_columns) <= 2:
            raise ValueError(f"data.text_columns must be one or two columns, got {', '.join(config.text_columns)}")
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
            last = "" if names is None else f" to {len(names) - 1}"
            raise ValueError(
                f"data: {len(bad)} labels of the {name} set are out of range or missing in column {column!r} "
                f"(values {seen}; first in row {bad[0] + 1}); a class is a word, or a whole number from 0{last}"
            )
    if names is not None:
        return list(enumerate(names))
    known = sorted(set(given["train"]), key=lambda value: (isinstance(value, str), value))
    for name, values in given.items():
        if strange := sorted(set(values) - set(known), key=str):
            rows = sum(value in strange for value in values)
            raise ValueError(f"data: {len(strange)} classes are in the {name} set only ({rows} rows): {some(strange)}")
    if len(known) > 1000 or (len(known) > 20 and len(known) == len(given["train"])):
        raise ValueError(f"data: column {column!r} has {len(known):,} different values, so it is not a class")
    plain = {" ".join(str(value).split()): value for value in known}
    if blank := [value for value in known if value not in plain.values()]:
        other = plain[" ".join(str(blank[0]).split())]
        raise ValueError(
            f"data: column {column!r} has both {blank[0]!r} and {other!r}; make them one class, or name them apart"
        )
    return [(value, str(value)) for value in known]


def _whole(value: Any) -> Any:
    """A whole number as an integer: a column of integers becomes one of floats where a row is empty."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _notes_on(names: Sequence[str]) -> list[str]:
    """What may be a mistake in the names of classes."""
    by_case: dict[str, list[str]] = {}
    for name in names:
        by_case.setdefault(name.lower(), []).append(name)
    twins = [" and ".join(group) for group in by_case.values() if len(group) > 1]
    return [f"warning: classes that differ in upper and lower case only: {some(twins)}"] if twins else []


def _out_of_range(value: Any, names: Sequence[str] | None) -> bool:
    if isinstance(value, float) or not isinstance(value, (str, int)):
        return True
    if isinstance(value, int):
        return value < 0 or (names is not None and value >= len(names))
    return not str(value).strip()


def _require_text(name: str, rows: Sequence[tuple], columns: Sequence[str]) -> None:
    bad = [number for number, row in enumerate(rows) if not all(isinstance(text, str) and text.strip() for text in row)]
    if bad:
        found = next(text for text in rows[bad[0]] if not isinstance(text, str) or not text.strip())
        raise ValueError(
            f"data: {len(bad)} rows of the {name} set have no text in {' or '.join(columns)}, first row {bad[0] + 1}, "
            f"which has {found!r}"
        )
