"""The layouts in which the data sets of FGVC are distributed: CUB-200-2011, NABirds, Oxford Flowers, Stanford Dogs and
Cars, and the split of visual prompt tuning (Jia et al., ECCV 2022), with which GPS was run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsel.training.splits import Listing, Split, some


def read_birds(root: Path) -> Listing:
    """CUB-200-2011 and NABirds: ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt``.

    NABirds numbers a whole hierarchy, of which 555 classes have images; those count, in the order of their numbers.

    Raises:
        ValueError: a file is missing or damaged, or the files contradict one another.
    """
    images, labels, training = (
        _pairs(root / name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    for name, other in (("image_class_labels.txt", labels), ("train_test_split.txt", training)):
        if lost := [image for image in images if image not in other]:
            raise ValueError(f"data: {len(lost)} images of {root / 'images.txt'} are not in {name}: {some(lost)}")
    names = _pairs(root / "classes.txt")
    used = {labels[image] for image in images}
    if strange := sorted(used - set(names)):
        count = sum(labels[image] in strange for image in images)
        raise ValueError(f"data: {count} labels are out of range, as classes.txt does not have them: {some(strange)}")
    numbers = sorted(used if (root / "hierarchy.txt").exists() else names, key=_numeric)
    place = {number: index for index, number in enumerate(numbers)}
    splits = {
        split: _split(
            ((root / "images" / path, place[labels[image]]) for image, path in images.items()
             if (training[image] == "1") is (split == "train"))
        )
        for split in ("train", "test")
    }  # fmt: skip
    plain = [re.sub(r"^\d+\.", "", names[number]).replace("_", " ") for number in numbers]
    return Listing(splits, _distinct(plain, numbers), "the official split, which has no validation set")


def read_flowers(root: Path) -> Listing:
    """Oxford Flowers 102: ``jpg/``, ``imagelabels.mat`` and ``setid.mat``; classes are called by their numbers.

    Raises:
        ValueError: a file is missing or damaged.
    """
    labels = [int(label) for label in _mat(root / "imagelabels.mat", "labels")]
    splits = {}
    for split, name in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        images = [int(number) for number in _mat(root / "setid.mat", name)]
        if wrong := [number for number in images if not 1 <= number <= len(labels)]:
            raise ValueError(f"data: {len(wrong)} images of setid.mat have no label in imagelabels.mat: {some(wrong)}")
        splits[split] = _split((root / "jpg" / f"image_{number:05}.jpg", labels[number - 1] - 1) for number in images)
    note = "the official split; the papers train on its training and validation sets together (--validation join)"
    return Listing(splits, [str(number + 1) for number in range(max(labels))], note)


def read_dogs(root: Path) -> Listing:
    """Stanford Dogs: ``Images/``, ``train_list.mat`` and ``test_list.mat``, here or in ``lists/``.

    Raises:
        ValueError: a file is missing or damaged.
    """
    lists = root / "lists" if (root / "lists").is_dir() else root
    splits: dict[str, Split] = {}
    names: dict[int, str] = {}
    for split in ("train", "test"):
        files, labels = (_mat(lists / f"{split}_list.mat", name) for name in ("file_list", "labels"))
        rows = [(str(file), int(label) - 1) for file, label in zip(files, labels, strict=True)]
        splits[split] = _split((root / "Images" / file, label) for file, label in rows)
        names |= {label: file.partition("/")[0].partition("-")[2].replace("_", " ") for file, label in rows}
    classes = [names.get(number, str(number + 1)) for number in range(max(names) + 1)]
    return Listing(splits, _distinct(classes, range(1, len(classes) + 1)), "the official split, without validation set")


def read_cars(root: Path) -> Listing:
    """Stanford Cars: ``cars_annos.mat`` with ``car_ims/``, or ``devkit/`` with ``cars_train/`` and ``cars_test/``.

    Raises:
        ValueError: a file is missing or damaged, or the labels of the test set are not here.
    """
    note = "the official split, without validation set"
    if (root / "cars_annos.mat").is_file():
        found = _mat(root / "cars_annos.mat", "annotations")
        names = [str(name) for name in _mat(root / "cars_annos.mat", "class_names")]
        splits = {
            split: _split(
                (root / str(each["relative_im_path"]), int(each["class"]) - 1)
                for each in found
                if bool(each["test"]) is (split == "test")
            )
            for split in ("train", "test")
        }
        return Listing(splits, names, note)
    names = [str(name) for name in _mat(root / "devkit" / "cars_meta.mat", "class_names")]
    labelled = "cars_test_annos_withlabels.mat"
    tested = next((each for each in (root / labelled, root / "devkit" / labelled) if each.is_file()), None)
    if tested is None:
        raise ValueError(f"data: {root} has no {labelled}, the labels of the test set of Stanford Cars; put it there")
    sources = {"train": root / "devkit" / "cars_train_annos.mat", "test": tested}
    splits = {
        split: _split(
            (root / f"cars_{split}" / str(each["fname"]), int(each["class"]) - 1)
            for each in _mat(path, "annotations")
        )
        for split, path in sources.items()
    }  # fmt: skip
    return Listing(splits, names, note)


def read_vpt(root: Path) -> Listing:
    """The split of visual prompt tuning: ``train.json``, ``val.json`` and ``test.json``, the class of each image.

    Raises:
        ValueError: a file is missing or damaged.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for split, name in (("train", "train.json"), ("validation", "val.json"), ("test", "test.json")):
        try:
            found[split] = json.loads((root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"data: {root / name} cannot be read ({error})") from None
        if not isinstance(found[split], Mapping) or not found[split]:
            raise ValueError(f"data: {root / name} must hold the class of each image by the image's path")
    first = next(iter(found["train"]))
    images = next((each for each in (root / "images", root / "Images", root) if (each / first).is_file()), root)
    numbers = sorted({str(label) for labels in found.values() for label in labels.values()}, key=_numeric)
    place = {number: index for index, number in enumerate(numbers)}
    splits = {
        split: _split((images / path, place[str(label)]) for path, label in labels.items())
        for split, labels in found.items()
    }
    note = "VPT's split, with which GPS was run, on its training and validation sets together (--validation join)"
    return Listing(splits, numbers, note)


def _split(pairs: Iterable[tuple[Path, int]]) -> Split:
    listed = list(pairs)
    return Split([str(path) for path, _ in listed], [label for _, label in listed])


def _pairs(path: Path) -> dict[str, str]:
    """Lines of a key, a space and a value."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {path} cannot be read ({error})") from None
    found: dict[str, str] = {}
    bad = []
    for number, line in enumerate(lines, 1):
        key, space, value = line.strip().partition(" ")
        if space:
            found[key] = value.strip()
        elif key:
            bad.append(number)
    if bad:
        raise ValueError(f"data: {len(bad)} lines of {path} have no space between a key and a value: {some(bad)}")
    return found


def _mat(path: Path, name: str) -> Any:
    """A variable of a file of Matlab, as a one-dimensional array."""
    import numpy
    from scipy.io import loadmat

    try:
        return numpy.atleast_1d(loadmat(str(path), squeeze_me=True, variable_names=[name])[name])
    except KeyError:
        raise ValueError(f"data: {path} has no variable {name}") from None
    except Exception as error:  # scipy raises many kinds
        raise ValueError(f"data: {path} cannot be read ({type(error).__name__}: {error})") from None


def _numeric(text: str) -> tuple[int, str]:
    return (int(text), text) if text.isdecimal() else (0, text)


def _distinct(names: Sequence[str], numbers: Iterable[Any]) -> list[str]:
    """The names, with the number of the class where several have the same."""
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} ({number})" for name, number in zip(names, numbers, strict=True)
    ]  # fmt: skip
