"""Data sets of torchvision by name, and whatever the library datasets loads: hub, local folder, saved to disk."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from gradsel.errors import did_you_mean
from gradsel.training.config import DataConfig
from gradsel.training.splits import Data, Split, Stored, checked_images, named_splits, some
from gradsel.training.tables import loaded, read_columns

#: What a path begins with.
TORCHVISION, HUB = "torchvision/", "hf/"
#: What torchvision calls a split, in the order in which they are tried.
_NAMES = {"train": ("train", "trainval"), "validation": ("val", "valid"), "test": ("test",)}
#: Splits of torchvision whose labels nobody has published.
_HIDDEN = {("CLEVRClassification", "test"), ("FER2013", "test")}


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` of the library datasets wrote a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


# --- torchvision -------------------------------------------------------------------------------------------------


def read_torchvision(config: DataConfig) -> Data:
    """Reads a data set of torchvision, ``torchvision/CIFAR10``, from ``config.root``; fetches it if asked to.

    Raises:
        ValueError: there is none such, it is not in the folder, or it is not for classification.
    """
    import torchvision

    name = config.path.removeprefix(TORCHVISION)
    known = {each.lower(): each for each in torchvision.datasets.__all__}
    if name.lower() not in known:
        hint = did_you_mean(name, list(known.values()))
        raise ValueError(f"data.path: torchvision has no data set {name!r}{hint}")
    name = known[name.lower()]
    if config.root is None:
        raise ValueError(f"data.root is not set; pass --root, the folder of torchvision's {name}")
    kind = getattr(torchvision.datasets, name)
    parameters = inspect.signature(kind).parameters
    found: dict[str, Any] = {}
    for split, options in _options(name, parameters):
        if split not in found and (opened := _opened(config, name, kind, parameters, options, split)) is not None:
            found[split] = opened
    if "train" not in found:
        raise ValueError(f"data.path: torchvision's {name} has no training set of a known name")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    splits = {split: _listed(name, split, dataset) for split, dataset in found.items()}
    classes = [str(each) for each in getattr(found["train"], "classes", [])]
    count = 1 + max(label for split in splits.values() for label in split.labels)
    if len(classes) < count or len(set(classes)) < len(classes):
        classes = [str(number) for number in range(count)]
    notes = [f"torchvision's {name} in {config.root}, with its own split: {', '.join(splits)}"]
    return checked_images(config, splits, classes, notes, published=True)


def _options(name: str, parameters: Any) -> list[tuple[str, dict[str, Any]]]:
    """The arguments by which torchvision gives each split."""
    if "train" in parameters:
        return [("train", {"train": True}), ("test", {"train": False})]
    if "split" in parameters and parameters["split"].default is not inspect.Parameter.empty:
        return [
            (split, {"split": value})
            for split, values in _NAMES.items()
            for value in values
            if (name, value) not in _HIDDEN
        ]
    return [("train", {})]


def _opened(config: DataConfig, name: str, kind: Any, parameters: Any, options: dict[str, Any], split: str) -> Any:
    """The data set; None if torchvision knows no split of that name."""
    download = {"download": config.download} if "download" in parameters else {}
    try:
        return kind(config.root, **options, **download)
    except ValueError as error:
        if "split" in options and "split" in str(error):
            return None
        raise _failed(name, config, error) from error
    except Exception as error:  # torchvision raises many kinds
        raise _failed(name, config, error) from error


def _failed(name: str, config: DataConfig, error: Exception) -> ValueError:
    told = " ".join(str(error).split())[:200]
    absent = isinstance(error, (RuntimeError, OSError)) and not config.download
    hint = "; pass --download to fetch it" if absent else ""
    return ValueError(f"data.path: torchvision cannot read {name} in {config.root} ({told}){hint}")


def _listed(name: str, split: str, dataset: Any) -> Split:
    labels = _labels(dataset)
    try:
        numbers = [int(label) for label in labels]
    except (TypeError, ValueError):
        raise ValueError(
            f"data.path: torchvision's {name} is not for classification: it has no class numbers"
        ) from None
    images = _Images(dataset)
    return Split([Stored(images, index, f"{name}, {split}") for index in range(len(numbers))], numbers)


def _labels(dataset: Any) -> Any:
    """The labels, without decoding the images where the data set has them at hand."""
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            return found
    return [dataset[index][1] for index in range(len(dataset))]


class _Images:
    """The images of a data set of pairs."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index][0]


# --- datasets ----------------------------------------------------------------------------------------------------


def read_hub(config: DataConfig) -> Data:
    """Reads what ``datasets.load_dataset`` does: ``hf/ID``, ``hf/ID:CONFIGURATION`` or ``hf/FOLDER``.

    A folder that ``save_to_disk`` wrote needs no ``hf/``.

    Raises:
        ValueError: it cannot be loaded, has no training set, or something is wrong with its columns or rows.
    """
    given = config.path.removeprefix(HUB)
    path, _, name = given.partition(":") if not Path(given).exists() else (given, "", "")
    failed = f"data.path: datasets cannot load {config.path}"
    if is_saved(Path(path)):
        found = loaded(lambda datasets: datasets.load_from_disk(path), failed)
    else:
        found = loaded(lambda datasets: datasets.load_dataset(path, name or None), failed)
    return read_dataset(config, found)


def read_dataset(config: DataConfig, found: Any) -> Data:
    """Reads a ``datasets.DatasetDict``, or a ``Dataset``, which is then the training set.

    A test set whose labels are hidden (all -1) is left out; the validation set is the test set then.

    Raises:
        ValueError: see :func:`read_hub`.
    """
    tables = dict(found) if isinstance(found, dict) else {"train": found}
    notes = []
    for key in [key for key, table in tables.items() if _is_hidden(config, table)]:
        del tables[key]
        notes.append(f"left out: the set {key}, whose labels nobody has published")
    names = named_splits(tables)
    if "train" not in names:
        raise ValueError(f"data.path: {config.path} has no training set; it has {some(tables)}")
    if unused := sorted(set(tables) - set(names.values())):
        notes.append(f"not used: {some(unused)}")
    data = read_columns(config, {split: tables[key] for split, key in names.items()})
    data.notes.extend(notes)
    return data


def _is_hidden(config: DataConfig, table: Any) -> bool:
    column = config.label_column or "label"
    return column in table.column_names and len(table) > 0 and all(label == -1 for label in table[column])
