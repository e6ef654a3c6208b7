"""Finds out in which of the known layouts a folder of images is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gradsel.training.config import DataConfig
from gradsel.training.fgvc import read_birds, read_cars, read_dogs, read_flowers, read_vpt
from gradsel.training.splits import Data, Listing, checked_images, some
from gradsel.training.vtab import is_vtab, read_vtab


class Layout(NamedTuple):
    """A layout in which a data set is distributed.

    Attributes:
        title: of the data set.
        detect: whether a folder has it.
        read: lists what is in the folder.
    """

    title: str
    detect: Callable[[Path], bool]
    read: Callable[[Path, DataConfig], Listing]


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda root: all((root / name).exists() for name in names)


def _is_birds(root: Path) -> bool:
    return _has("images.txt", "image_class_labels.txt", "train_test_split.txt")(root)


def _alone(read: Callable[[Path], Listing]) -> Callable[[Path, DataConfig], Listing]:
    """A reader that needs no settings."""
    return lambda root, config: read(root)


#: By name; the first that a folder has is read.
LAYOUTS = {
    "cub": Layout(
        "CUB-200-2011", lambda root: _is_birds(root) and not (root / "hierarchy.txt").exists(), _alone(read_birds)
    ),
    "nabirds": Layout(
        "NABirds", lambda root: _is_birds(root) and (root / "hierarchy.txt").exists(), _alone(read_birds)
    ),
    "flowers": Layout("Oxford Flowers 102", _has("imagelabels.mat", "setid.mat"), _alone(read_flowers)),
    "dogs": Layout(
        "Stanford Dogs",
        lambda root: _has("Images", "train_list.mat")(root) or _has("Images", "lists/train_list.mat")(root),
        _alone(read_dogs),
    ),
    "cars": Layout(
        "Stanford Cars",
        lambda root: _has("cars_annos.mat")(root) or _has("devkit/cars_meta.mat")(root),
        _alone(read_cars),
    ),
    "vtab": Layout("VTAB-1k", is_vtab, read_vtab),
    "vpt": Layout("FGVC", _has("train.json", "val.json", "test.json"), _alone(read_vpt)),
}


def find_layout(path: Path) -> tuple[Path, list[str]]:
    """The folder that has a known layout, and the names of all that it has.

    Args:
        path: the folder itself, or one with a single folder that has a layout.

    Raises:
        ValueError: several folders inside have one.
    """
    if found := _layouts_of(path):
        return path, found
    inside = [(each, layouts) for each in sorted(path.iterdir()) if each.is_dir() and (layouts := _layouts_of(each))]
    if len(inside) > 1:
        names = some(each.name for each, _ in inside)
        raise ValueError(f"data.path: {path} holds several data sets; pass one of its folders: {names}")
    return inside[0] if inside else (path, [])


def _layouts_of(root: Path) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if layout.detect(root)]


def read_layout(config: DataConfig, root: Path, name: str, others: list[str]) -> Data:
    """Reads and checks a folder in a known layout.

    Args:
        others: layouts that it has as well, for the notes.

    Raises:
        ValueError: something is missing or wrong; the message names and counts it.
    """
    layout = LAYOUTS[name]
    if not layout.detect(root):
        has = some(sorted(each.name for each in root.iterdir()))
        raise ValueError(f"data.layout: {root} is not in the layout {name} ({layout.title}); it has {has}")
    listing = layout.read(root, config)
    notes = [f"{root} has the layout {name} ({layout.title}): {listing.note}"]
    notes += [f"it has the layout {other} as well, which --layout {other} reads" for other in others if other != name]
    return checked_images(config, listing.splits, listing.classes, notes, published=True)
