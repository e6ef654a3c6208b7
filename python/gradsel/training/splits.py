"""Training, validation and test sets, and the checks that images pass before any training."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from gradsel.training.config import DataConfig

#: The names that files and folders have, by split.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


class Split(NamedTuple):
    """Part of the data.

    Attributes:
        inputs: images, as paths or :class:`Stored`; or tuples of one or two texts.
        labels: numbers of classes, or paths of masks.
    """

    inputs: list[Any]
    labels: list[Any]


class Stored(NamedTuple):
    """An image that lies in a data set of a library instead of a file of its own.

    Attributes:
        images: PIL images by index.
        number: which of them.
        name: of the data set, for messages.
    """

    images: Any
    number: int
    name: str

    def open(self) -> Any:
        """The image."""
        return self.images[self.number]

    def __str__(self) -> str:
        return f"image {self.number} of {self.name}"


@dataclass(frozen=True)
class Data:
    """Everything there is to train and test on.

    Attributes:
        kind: ``"images"``, ``"texts"`` or ``"masks"``.
        classes: names, in the order of the labels.
        splits: ``"train"``, ``"test"``, and ``"validation"`` if there is one.
        notes: what was found and left out, for the log.
        published: whether others have fixed classes and splits. Then a class without training samples is told in the
            notes; in data of one's own it is an error.
    """

    kind: str
    classes: list[str]
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)
    published: bool = False


class Listing(NamedTuple):
    """What a layout lists, before it is checked.

    Attributes:
        splits: paths of images, which may not exist, and numbers of classes, which may be out of range.
        classes: names.
        note: which split it is.
    """

    splits: dict[str, Split]
    classes: list[str]
    note: str


def named_splits(names: Iterable[str]) -> dict[str, str]:
    """The names of a folder, a file or a key by the split it holds; with one further set, that is the test set."""
    inside = {name.lower(): name for name in names}
    found = {
        split: next(inside[name] for name in known if name in inside)
        for split, known in SPLITS.items()
        if any(name in inside for name in known)
    }
    if "train" in found and "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")  # so nothing is chosen by it
    return found


def joined(*splits: Split) -> Split:
    """One after the other."""
    return Split([x for split in splits for x in split.inputs], [y for split in splits for y in split.labels])


def only_tested(data: Data) -> Data:
    """The same data with nothing but a test set, which is all of them if they have none.

    Raises:
        ValueError: it is empty.
    """
    test = data.splits.get("test") or joined(*data.splits.values())
    if not test.labels:
        raise ValueError("data: there is nothing to test on, the test set is empty")
    return replace(data, splits={"test": test})


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


def some(names: Iterable[Any], most: int = 5) -> str:
    """The first few names, and how many there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def require_classes(data: Data) -> None:
    """Checks that every class can be learnt.

    Raises:
        ValueError: there are fewer than two, or classes without training samples in data that are not published ones;
            of those, the notes tell.
    """
    counts = {name: Counter(split.labels) for name, split in data.splits.items()}
    if len(data.classes) < 2:
        raise ValueError(f"data: there is one class only, {data.classes[0]!r}; at least two are needed")
    empty = [number for number in range(len(data.classes)) if not counts["train"][number]]
    if not empty:
        return
    told = f"{len(empty)} classes have no training sample: {some(data.classes[number] for number in empty)}"
    if not data.published:
        raise ValueError(f"data: {told}")
    tested = [number for number in empty if counts.get("test", Counter())[number]]
    data.notes.append(told)
    if tested:
        samples = sum(counts["test"][number] for number in tested)
        data.notes.append(
            f"{len(tested)} classes are in the test set only ({samples} samples): "
            f"{some(data.classes[number] for number in tested)}"
        )


def checked_images(
    config: DataConfig, splits: Mapping[str, Split], classes: Sequence[str], notes: Iterable[str], published: bool
) -> Data:
    """Checks labels and images of a listing.

    Raises:
        ValueError: labels are out of range, or images are missing or unreadable, unless the latter are to be skipped.
    """
    notes = list(notes)
    for name, split in splits.items():
        wrong = [label for label in split.labels if not 0 <= label < len(classes)]
        if wrong:
            raise ValueError(
                f"data: {len(wrong)} labels of the {name} set are out of range ({some(sorted(set(wrong)))}); there are "
                f"{len(classes)} classes, numbered from 0"
            )
    everything = [each for split in splits.values() for each in split.inputs]
    missing = [each for each in everything if not isinstance(each, Stored) and not Path(each).is_file()]
    absent = {str(each) for each in missing}
    broken = unreadable([each for each in everything if isinstance(each, Stored) or str(each) not in absent])
    for bad, told in ((missing, "are listed but missing"), (broken, "cannot be read")):
        if not bad:
            continue
        listed = f"{len(bad)} images {told}: {some(bad)}"
        if not config.skip_unreadable:
            raise ValueError(f"data: {listed}; pass --skip-unreadable to leave them out")
        notes.append(f"left out: {listed}")
    left_out = {_key(each) for each in (*missing, *broken)}
    kept = {name: _without(split, left_out) if left_out else split for name, split in splits.items()}
    return Data("images", list(classes), kept, notes, published)


def _key(image: Any) -> Any:
    return (image.name, image.number) if isinstance(image, Stored) else str(image)


def _without(split: Split, left_out: set[Any]) -> Split:
    pairs = [pair for pair in zip(*split, strict=True) if _key(pair[0]) not in left_out]
    return Split([image for image, _ in pairs], [label for _, label in pairs])


def unreadable(images: Sequence[Any]) -> list[Any]:
    """The images that cannot be decoded, found by decoding all of them."""
    with ThreadPoolExecutor(4) as pool:
        return [each for each, good in zip(images, pool.map(_is_readable, images), strict=True) if not good]


def _is_readable(image: Any) -> bool:
    from PIL import Image

    try:
        if isinstance(image, Stored):
            image.open().load()
            return True
        with Image.open(image) as opened:
            opened.draft("RGB", (64, 64))  # JPEG is then decoded at an eighth of its size
            opened.load()
    except Exception:  # PIL raises whatever its decoders do
        return False
    return True
