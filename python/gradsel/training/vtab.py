"""VTAB-1k as it is distributed: images, and lists of them with their labels."""

from __future__ import annotations

from pathlib import Path

from gradsel.training.config import DataConfig
from gradsel.training.splits import Listing, Split, some

#: 800 and 200 samples, and the same 1,000 together, under either name.
TRAIN, VALIDATION, TEST, BOTH = "train800.txt", "val200.txt", "test.txt", ("train800val200.txt", "train1000.txt")


def is_vtab(root: Path) -> bool:
    """Whether a folder has the lists."""
    has = {name for name in (TRAIN, VALIDATION, TEST, *BOTH) if (root / name).is_file()}
    return TEST in has and (bool(has & set(BOTH)) or {TRAIN, VALIDATION} <= has)


def read_vtab(root: Path, config: DataConfig) -> Listing:
    """Reads the lists: each line has the path of an image and the number of its class.

    With ``config.validation`` ``"use"`` there is a validation set of 200 where its list is here; with ``"join"``, as in
    the papers, all 1,000 train. There are ``config.classes`` classes, or as many as the largest label says.

    Raises:
        ValueError: a list is missing or damaged.
    """
    both = next((name for name in BOTH if (root / name).is_file()), None)
    apart = (root / TRAIN).is_file() and (root / VALIDATION).is_file()
    if both is not None and (config.validation == "join" or not apart):
        files = {"train": both, "test": TEST}
    else:
        files = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    splits = {split: _listed(root, name) for split, name in files.items()}
    count = config.classes or 1 + max(label for split in splits.values() for label in split.labels)
    note = f"the published lists {', '.join(files.values())}"
    if "validation" in files:
        note += "; the papers train on both of the first (--validation join)"
    return Listing(splits, [str(number) for number in range(count)], note)


def _listed(root: Path, name: str) -> Split:
    try:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {root / name} cannot be read ({error})") from None
    images, labels, bad = [], [], []
    for number, line in enumerate(lines, 1):
        words = line.rsplit(maxsplit=1)
        if len(words) == 2 and words[1].lstrip("-").isdecimal():
            images.append(str(root / words[0].strip()))
            labels.append(int(words[1]))
        elif words:
            bad.append(number)
    if bad:
        raise ValueError(f"data: {len(bad)} lines of {root / name} are not a path and a number: {some(bad)}")
    if not images:
        raise ValueError(f"data: {root / name} lists no image")
    return Split(images, labels)
