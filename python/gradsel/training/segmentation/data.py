"""Reading images with masks, in the layout of Kvasir-SEG; checked file by file before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from gradsel.training.config import DataConfig
from gradsel.training.splits import Data, Split, hold_out, named_splits, some

CLASSES = ["background", "foreground"]
#: Gray levels above this are foreground; JPEG, in which Kvasir-SEG's masks are, blurs their edges.
_LEVEL = 127


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


class _Checked(NamedTuple):
    """What is wrong with a pair, and whether nothing is in its mask."""

    unreadable: tuple[Path, ...] = ()
    size: str | None = None
    empty: bool = False


def read_masks(config: DataConfig, seed: int = 0, *, only_test: bool = False) -> Data:
    """Reads and checks a folder of images with masks.

    The folder has ``images/`` and ``masks/`` with files of the same names (but for the suffix), and perhaps lists of
    names, ``train.txt``, ``val.txt`` and ``test.txt``; or it has ``train/``, ``val/`` and ``test/``, each with
    ``images/`` and ``masks/``. Without a test set, a validation set is the test set; without both, images are held out.

    Args:
        seed: of the split, where the data have no test set.
        only_test: nothing is trained: if the data have no test set, all of them are one.

    Returns:
        Data of the kind ``"masks"``; labels are paths of masks.

    Raises:
        ValueError: there are no such data; files cannot be read; images and masks do not belong together; or there is
            nothing in any mask of a split. The message names and counts them.
    """
    path = Path(config.path)
    if not path.exists():
        raise ValueError(f"data.path: there is no folder {config.path}")
    if not path.is_dir():
        raise ValueError(f"data.path: {path} is a file; a folder with images/ and masks/ is expected")
    notes: list[str] = []
    if folders := _splits(path, {each.name: each for each in path.iterdir() if each.is_dir()}):
        found = {name: _pairs(folder) for name, folder in folders.items()}
    else:
        found = _by_lists(path, _pairs(path), notes)
    splits = _checked(found, config.skip_unreadable, notes)
    if only_test:
        splits = {"test": splits.get("test") or [pair for pairs in splits.values() for pair in pairs]}
    elif "test" not in splits:
        if len(splits["train"]) == 1:
            raise ValueError("data: there is one image only, and no test set; at least two are needed")
        numbers = Split(list(range(len(splits["train"]))), [0] * len(splits["train"]))
        train, test = hold_out(numbers, config.holdout, seed)
        notes.append(f"the data have no test set: {len(test.labels):,} samples are held out, with seed {seed}")
        pairs = splits["train"]
        splits.update(train=[pairs[n] for n in train.inputs], test=[pairs[n] for n in test.inputs])
    for name, pairs in splits.items():
        if not pairs:
            raise ValueError(f"data: the {name} set is empty")
    return Data(
        "masks", CLASSES,
        {name: Split([str(p.image) for p in pairs], [str(p.mask) for p in pairs]) for name, pairs in splits.items()},
        notes,
    )  # fmt: skip


def read_mask(path: str | Path) -> Tensor:
    """A mask [height, width] in uint8, 1 for foreground: gray levels above 127, or 1 in a mask of 0 and 1.

    Raises:
        ValueError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            levels = numpy.asarray(image.convert("L"))
    except Exception as error:  # PIL raises whatever its decoders do
        raise ValueError(f"{path} cannot be read as a mask ({type(error).__name__})") from None
    return torch.from_numpy((levels > (_LEVEL if levels.max(initial=0) > 1 else 0)).astype(numpy.uint8))


# --- Which files belong together ---------------------------------------------------------------------------------


def _splits(path: Path, inside: Mapping[str, Path]) -> dict[str, Path]:
    """Folders or lists by the split they are named after; none, or one for training among them."""
    found = {split: inside[name] for split, name in named_splits(inside).items()}
    if found and "train" not in found:
        raise ValueError(f"data.path: {path} has {some(each.name for each in found.values())}, but none for training")
    return found


def _pairs(folder: Path) -> dict[str, Pair]:
    """Images with their masks by name.

    Raises:
        ValueError: one has no other.
    """
    inside = {each.name.lower(): each for each in folder.iterdir() if each.is_dir()}
    if missing := [name for name in ("images", "masks") if name not in inside]:
        raise ValueError(f"data.path: {folder} has no folder {' and no folder '.join(missing)}")
    images, masks = _by_stem(inside["images"]), _by_stem(inside["masks"])
    if not images:
        raise ValueError(f"data.path: there are no images in {inside['images']}")
    problems = []
    for kind, own, other in (("images have no mask", images, masks), ("masks have no image", masks, images)):
        if alone := sorted(set(own) - set(other)):
            problems.append(f"{len(alone)} {kind} of the same name: {some(own[name].name for name in alone)}")
    if problems:
        raise ValueError(f"data: in {folder}, {'; '.join(problems)}")
    return {name: Pair(images[name], masks[name]) for name in sorted(images)}


def _by_stem(folder: Path) -> dict[str, Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in IMG_EXTENSIONS or file.name.startswith(".") or not file.is_file():
            continue
        if file.stem in found:
            raise ValueError(f"data: {found[file.stem].name} and {file.name} in {folder} have the same name")
        found[file.stem] = file
    return found


def _by_lists(path: Path, pairs: Mapping[str, Pair], notes: list[str]) -> dict[str, dict[str, Pair]]:
    """Splits by lists of names, one on each line, if there are any."""
    lists = _splits(path, {each.stem: each for each in path.glob("*.txt")})
    if not lists:
        return {"train": dict(pairs)}
    splits = {name: {stem: pairs[stem] for stem in _listed(file, pairs)} for name, file in lists.items()}
    seen: dict[str, str] = {}
    for name, own in splits.items():
        if twice := [stem for stem in own if stem in seen]:
            raise ValueError(f"data: {len(twice)} images are in {seen[twice[0]]} and {name} both: {some(twice)}")
        seen.update(dict.fromkeys(own, name))
    if left := [stem for stem in pairs if stem not in seen]:
        notes.append(f"left out: {len(left)} images are in no list: {some(left)}")
    return splits


def _listed(file: Path, pairs: Mapping[str, Pair]) -> list[str]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    stems = [line if line in pairs else Path(line).stem for line in lines]
    if unknown := [line for line, stem in zip(lines, stems, strict=True) if stem not in pairs]:
        raise ValueError(f"data: {len(unknown)} names in {file} are those of no image: {some(unknown)}")
    return stems


# --- Whether they can be used ------------------------------------------------------------------------------------


def _checked(found: Mapping[str, Mapping[str, Pair]], skip_unreadable: bool, notes: list[str]) -> dict[str, list[Pair]]:
    """The usable pairs by split.

    Raises:
        ValueError: see :func:`read_masks`.
    """
    every = [pair for pairs in found.values() for pair in pairs.values()]
    with ThreadPoolExecutor(4) as pool:
        checked = dict(zip(every, pool.map(_check, every), strict=True))
    problems = []
    unreadable = [file for each in checked.values() for file in each.unreadable]
    if unreadable:
        listed = f"{len(unreadable)} files cannot be read: {some(unreadable)}"
        if skip_unreadable:
            notes.append(f"left out: {listed}")
        else:
            problems.append(f"{listed}; pass --skip-unreadable to leave them out with what belongs to them")
    if sizes := [each.size for each in checked.values() if each.size is not None]:
        problems.append(f"{len(sizes)} masks have another size than their image: {some(sizes)}")
    if problems:
        raise ValueError(f"data: {'; '.join(problems)}")
    usable = {name: [pair for pair in pairs.values() if not checked[pair].unreadable] for name, pairs in found.items()}
    for name, pairs in usable.items():
        empty = [pair.mask.name for pair in pairs if checked[pair].empty]
        if not empty:
            continue
        listed = f"{len(empty)} masks of the {name} set are empty, without a gray level above {_LEVEL}: {some(empty)}"
        if len(empty) == len(pairs):
            raise ValueError(f"data: {listed}; these are all there are")
        notes.append(listed)
    return usable


def _check(pair: Pair) -> _Checked:
    from PIL import Image

    sizes, unreadable, empty = [], [], False
    for file in pair:
        try:
            with Image.open(file) as image:
                image.load()
                sizes.append(image.size)
            if file is pair.mask:
                empty = not bool(read_mask(file).any())
        except Exception:  # PIL raises whatever its decoders do
            unreadable.append(file)
    if unreadable:
        return _Checked(tuple(unreadable))
    if sizes[0] != sizes[1]:
        return _Checked(size=f"{pair.mask.name} ({_size(sizes[1])}, not {_size(sizes[0])})")
    return _Checked(empty=empty)


def _size(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))
