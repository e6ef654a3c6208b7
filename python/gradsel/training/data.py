"""Reading data: finds out what they are, reads and checks them before any training."""

from __future__ import annotations

import os
from pathlib import Path

from gradsel.training.config import DataConfig
from gradsel.training.glue import TASKS, read_glue
from gradsel.training.layouts import LAYOUTS, find_layout, read_layout
from gradsel.training.libraries import HUB, TORCHVISION, is_saved, read_hub, read_torchvision
from gradsel.training.splits import (
    Data,
    Split,
    checked_images,
    hold_out,
    joined,
    named_splits,
    only_tested,
    require_classes,
    some,
)
from gradsel.training.tables import TABLES, read_tables

__all__ = ["Data", "Split", "hold_out", "joined", "portable_path", "read_data"]


def read_data(config: DataConfig, seed: int = 0, *, only_test: bool = False) -> Data:
    """Reads and checks the data that a configuration names.

    Args:
        seed: of what is held out for testing or kept for validation, unless ``config.split_seed`` says otherwise.
        only_test: nothing is trained: the test set is theirs or, if they have none, all of them; they may have any
            number of classes.

    Raises:
        ValueError: there are no such data, or something is wrong with them: missing or unreadable files, empty classes,
            labels out of range, classes that only the test set has. The message names and counts them.
    """
    seed = seed if config.split_seed is None else config.split_seed
    data = _read(config)
    if only_test:
        return only_tested(data)
    if config.validation == "join" and "validation" in data.splits:
        data.splits["train"] = joined(data.splits["train"], data.splits.pop("validation"))
        data.notes.append("the validation set has joined the training set")
    require_classes(data)
    if "test" not in data.splits:
        train, test = hold_out(data.splits["train"], config.holdout, seed)
        if not test.labels:
            raise ValueError(
                "data: there is no test set, and no class has a second sample that could be held out for one"
            )
        data.notes.append(f"the data have no test set: {len(test.labels):,} samples are held out, with seed {seed}")
        data.splits.update(train=train, test=test)
    if config.validation_holdout is not None and "validation" not in data.splits:
        train, validation = hold_out(data.splits["train"], config.validation_holdout, seed)
        data.notes.append(f"{len(validation.labels):,} training samples are kept for validation, with seed {seed}")
        data.splits.update(train=train, validation=validation)
    for name, split in data.splits.items():
        if not split.labels:
            raise ValueError(f"data: the {name} set is empty")
    if config.classes not in (None, len(data.classes)):
        data.notes.append(f"warning: data.classes is {config.classes}, but the data name {len(data.classes)} classes")
    tested = set(data.splits["test"].labels)
    if untested := [name for number, name in enumerate(data.classes) if number not in tested]:
        data.notes.append(f"warning: the test set has no sample of {len(untested)} classes: {some(untested)}")
    return data


def portable_path(path: str) -> str:
    """The same data from any working directory: local paths become absolute."""
    if not path or (path.startswith(TORCHVISION) and not Path(path).exists()):
        return path
    if path.startswith(HUB):
        inner = path.removeprefix(HUB)
        return HUB + os.path.abspath(inner) if Path(inner).exists() else path
    return os.path.abspath(path)


def _read(config: DataConfig) -> Data:
    if config.task in TASKS:
        return read_glue(config)
    path = Path(config.path)
    if not path.exists() and config.path.startswith(TORCHVISION):
        return read_torchvision(config)
    if config.path.startswith(HUB):
        return read_hub(config)
    if not path.exists():
        raise ValueError(f"data.path: there is no file or folder {config.path}")
    if config.layout not in ("auto", "folder"):
        if not path.is_dir():
            raise ValueError(f"data.layout: {path} is a file; the layout {config.layout} is that of a folder")
        _require_no_columns(config, path)
        root, found = find_layout(path)
        return read_layout(config, root if config.layout in found else path, config.layout, found)
    if path.is_dir() and is_saved(path):
        return read_hub(config)
    if path.is_dir() and config.layout == "auto" and config.kind != "texts":
        root, found = find_layout(path)
        if found:
            _require_no_columns(config, path)
            return read_layout(config, root, found[0], found)
    return _images(config, path) if _is_image_folder(config, path) else read_tables(config, path)


def _is_image_folder(config: DataConfig, path: Path) -> bool:
    """Whether a folder has folders of images; else it has tables, perhaps beside the images that they list."""
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ValueError(f"data.path: {path} is not a table; known are {', '.join(TABLES)}, or a folder")
        return False
    if config.kind == "texts":
        return False
    inside = [each for each in path.iterdir() if _visible(each)]
    folders = [each.name for each in inside if each.is_dir()]
    tables = [each.stem for each in inside if each.is_file() and each.suffix.lower() in TABLES]
    if "train" in named_splits(tables) and "train" not in named_splits(folders):
        return False
    return bool(folders) or not tables


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__"))


# --- Folders of images -------------------------------------------------------------------------------------------


def _require_no_columns(config: DataConfig, path: Path) -> None:
    """Refuses settings that would be ignored."""
    for name in ("image_column", "text_columns", "label_column"):
        if getattr(config, name) is not None:
            raise ValueError(f"data.{name} is for tables, but {path} is a folder of images; leave it out")


def _images(config: DataConfig, path: Path) -> Data:
    _require_no_columns(config, path)
    folders = _split_folders(path)
    found = {name: _classes_of(folder) for name, folder in folders.items()}
    classes = sorted(found["train"])
    if not classes:
        known = ", ".join(name for name in LAYOUTS)
        raise ValueError(
            f"data.path: {folders['train']} has no folders, one for each class with its images; nor is it one of the "
            f"layouts {known}"
        )
    for name, by_class in found.items():
        if strange := sorted(set(by_class) - set(classes)):
            raise ValueError(
                f"data: {len(strange)} classes of the {name} set have no folder in training: {some(strange)}"
            )
    splits = {}
    for name, by_class in found.items():
        pairs = [(str(file), number) for number, label in enumerate(classes) for file in by_class.get(label, ())]
        splits[name] = Split([file for file, _ in pairs], [number for _, number in pairs])
    return checked_images(config, splits, classes, [], published=False)


def _split_folders(path: Path) -> dict[str, Path]:
    inside = {each.name: each for each in sorted(path.iterdir()) if each.is_dir()}
    found = {split: inside[name] for split, name in named_splits(inside).items()}
    if found and "train" not in found:
        raise ValueError(f"data.path: {path} has {some(f.name for f in found.values())}, but no folder train")
    return found or {"train": path}


def _classes_of(folder: Path) -> dict[str, list[Path]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return {
        label.name: sorted(
            file for file in label.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
        )
        for label in sorted(folder.iterdir())
        if label.is_dir() and _visible(label)
    }
