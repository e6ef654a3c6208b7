"""The demo's data: scikit-learn's handwritten digits, split into old and new classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

#: The classes that the network is pre-trained on, and those that it is adapted to.
OLD, NEW = range(5), range(5, 10)
#: Parts of the images of each new class, as slices of percentages: one third chose the learning rates, and only the
#: others count in the table.
TUNING, REPORTED = slice(0, 33), slice(33, 100)


class Split(NamedTuple):
    """Images [n, 1, 8, 8] and their classes [n], for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits as [n, 1, 8, 8] in -1 to 1, always in the same random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[order], torch.tensor(data.target)[order]


def split(classes: range, shots: int | float, part: slice, seed: int = 0) -> Split:
    """Random ``shots`` images of each class (a fraction of it, if below 1) for training, the others for testing.

    Args:
        part: the images of a class to use, as a slice of percentages.
    """
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in classes:
        of_class = (labels == label).nonzero().view(-1)
        of_class = of_class[len(of_class) * part.start // 100 : len(of_class) * part.stop // 100]
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        count = int(shots) if shots >= 1 else int(shots * len(of_class))
        train.append(of_class[:count])
        test.append(of_class[count:])
    learn, check = torch.cat(train), torch.cat(test)
    return Split(images[learn], labels[learn] - classes.start, images[check], labels[check] - classes.start)
