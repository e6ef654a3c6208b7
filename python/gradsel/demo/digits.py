"""scikit-learn's handwritten digits, as arrays and as folders of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: The classes that the demo's model is pre-trained on, and those that it is fine-tuned on.
OLD, NEW = range(5), range(5, 10)


def digits() -> tuple[numpy.ndarray, numpy.ndarray]:
    """All 1,797 images, uint8 [n, 8, 8], and their digits [n]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16 * 255).round().astype(numpy.uint8), data.target


def write_folder(
    root: Path, classes: Iterable[int], sizes: Mapping[str, int | None], seed: int = 0, part: slice = slice(0, 100)
) -> Path:
    """Writes ``root/split/name/number.png``, drawn at random.

    Args:
        classes: digits.
        sizes: images of each class, by split; None: all that are left.
        part: the images of a class to draw from, as a slice of percentages.
    """
    from PIL import Image

    images, targets = digits()
    for digit in classes:
        numbers = numpy.flatnonzero(targets == digit)
        numbers = numbers[len(numbers) * part.start // 100 : len(numbers) * part.stop // 100]
        left = numpy.random.default_rng((seed, digit)).permutation(numbers).tolist()
        for split, size in sizes.items():
            folder = root / split / NAMES[digit]
            folder.mkdir(parents=True)
            taken, left = (left, []) if size is None else (left[:size], left[size:])
            for number in taken:
                Image.fromarray(images[number]).save(folder / f"{number}.png")
    return root
